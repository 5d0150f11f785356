"""TLS over a TCP socket, for a thread that reads and one that writes at the same time.

The standard library's `SSLSocket` is not made for that: OpenSSL wants one thread at a time, and a read that waits would
keep the lock. Here OpenSSL works in memory, and the waiting is done outside.
"""

import socket
import ssl
import threading
from collections.abc import Callable

LOST_SECONDS = 8
"""After which a connection counts as lost that nothing comes through."""

_PIECE = 1 << 18


class TlsStream:
    """What `Channel` needs of a socket. The caller calls `handshake` first."""

    family = socket.AF_INET

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, listens: bool):
        _notice_loss(sock)
        self._socket = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=listens)
        self._one = threading.Lock()
        self._in_order = threading.Lock()

    def handshake(self, accepts: Callable[[bytes | None], bool] = lambda certificate: True) -> None:
        """accepts: asked about the other end's certificate, in DER. Raises OSError (ssl.SSLError among them), and
        PermissionError where it is not accepted."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                self._fetch()
        self._flush()
        if not accepts(self._tls.getpeercert(binary_form=True)):
            raise PermissionError("the certificate is another one")

    def settimeout(self, seconds: float | None) -> None:
        self._socket.settimeout(seconds)

    def recv(self, most: int) -> bytes:
        """As a socket's; empty also where the other end is gone without a word."""
        data = bytearray(most)
        return bytes(data[: self.recv_into(data)])

    def recv_into(self, buffer: bytearray | memoryview) -> int:
        """As a socket's; 0 also where the other end is gone without a word."""
        view, got = memoryview(buffer), 0
        while True:
            with self._one:
                try:
                    while got < len(view):  # a record at a time
                        part = self._tls.read(len(view) - got, view[got:])
                        if not part:
                            return got
                        got += part
                except ssl.SSLWantReadError:
                    pass
                except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                    return got
            if got:
                return got
            self._fetch()
            if self._outgoing.pending:  # TLS answers some things by itself
                self._flush()

    def sendall(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        with self._in_order:
            for start in range(0, len(view), _PIECE):
                with self._one:
                    self._tls.write(view[start : start + _PIECE])
                    sealed = self._outgoing.read()
                self._socket.sendall(sealed)

    def shutdown(self, how: int) -> None:
        self._socket.shutdown(how)

    def close(self) -> None:
        self._socket.close()

    def _fetch(self) -> None:
        data = self._socket.recv(_PIECE)
        with self._one:
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()

    def _flush(self) -> None:
        with self._in_order:
            with self._one:
                sealed = self._outgoing.read()
            self._socket.sendall(sealed)


def _notice_loss(sock: socket.socket) -> None:
    """Has the system end the connection when the other end does not answer any more, a cut cable among its reasons."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_SECONDS * 1000)
