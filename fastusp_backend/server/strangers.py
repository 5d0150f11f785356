"""Connections that have not proved yet that they have the key. Whoever opens many of them, and says nothing, keeps
nobody out: where there are too many, the oldest one from where most come from makes way."""

import contextlib
import ipaddress
import socket
import threading

STRANGERS = 32
"""So many at a time: the ranks of a machine may come together."""


class Strangers:
    def __init__(self):
        self._from: dict[str, list[socket.socket]] = {}
        self._lock = threading.Lock()

    def admit(self, sock: socket.socket, host: str) -> None:
        """One more, from an address, which `leave` follows. Ends the connection that makes way for it."""
        with self._lock:
            if sum(map(len, self._from.values())) >= STRANGERS:
                oldest = max(self._from.values(), key=len)[0]
                self._remove(oldest)
                with contextlib.suppress(OSError):  # it has ended
                    oldest.shutdown(socket.SHUT_RDWR)
            self._from.setdefault(_origin(host), []).append(sock)

    def leave(self, sock: socket.socket) -> None:
        """It is no stranger any more, or gone. Before it is closed."""
        with self._lock:
            self._remove(sock)

    def _remove(self, sock: socket.socket) -> None:
        for origin, sockets in self._from.items():
            if sock in sockets:
                sockets.remove(sock)
                if not sockets:
                    del self._from[origin]
                return


def _origin(host: str) -> str:
    """Whose an address is: this machine has all of 127.0.0.0/8, and a host of IPv6 mostly 64 bits of its own."""
    address = ipaddress.ip_address(host.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_loopback:
        return "loopback"
    if address.version == 4:
        return str(address)
    return str(ipaddress.IPv6Network((int(address), 64), strict=False))
