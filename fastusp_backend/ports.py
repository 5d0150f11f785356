"""gloo's ports, closed as soon as the ranks are connected.

A gloo group listens for as long as it lives, on the loopback interface, which all users of the machine reach, or where
its machine reaches the others of several. Of each
later connection it keeps a descriptor, until there is none left and the process ends; a connection that comes while the
ranks connect may take a rank's place, as all that gloo asks for is a small number.
"""

import ipaddress
import logging
import os
import re
import socket
import stat
import struct
import time
from ctypes import addressof, create_string_buffer
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_SO_ATTACH_FILTER = 26
_DROP_ALL = create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # one instruction of BPF: return 0 bytes
_FILTER = struct.pack("HP", 1, addressof(_DROP_ALL))
_ESTABLISHED, _CLOSE_WAIT, _LISTEN = "01", "08", "0A"
_MAPPED = "0000000000000000FFFF0000"
"""In front of an address of IPv4 that a socket of IPv6 uses."""
ADDRESSES_VARIABLE = "FASTUSP_ADDRESSES"
"""Holds those of all machines that ranks are on, where these are several."""
_READINGS = 20
"""A table of connections is read in parts, and may lack one while others come and go."""


def close_ports() -> None:
    """Closes the ports of all gloo groups of this process to newcomers; its groups stay as they are. To be called
    where groups were made, in that thread: all that are there must be connected.

    Raises PermissionError where another user's process is connected to one of them, RuntimeError where one that was
    connected has gone.
    """
    inodes = set()
    for listener in _gloo_listeners():
        with listener:
            inodes.add(os.fstat(listener.fileno()).st_ino)
            try:
                listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _FILTER)
            except OSError as error:
                log.warning("port %d stays open to all users of this machine: %s", listener.getsockname()[1], error)
    for _ in range(_READINGS):
        strangers = _strangers(inodes)
        if not strangers:
            return
        time.sleep(0.01)
    if others := strangers - {None}:
        raise PermissionError(
            f"queue the prompt again; if this happens again, tell the machine's administrator: a process of user "
            f"{min(others)} connected to a port of the workers as they started"
        )
    raise RuntimeError("Connection closed by another process while the ranks connected; queue the prompt again")


def _gloo_listeners() -> list[socket.socket]:
    """Duplicates gloo's listening sockets: those on our addresses that epoll watches. NCCL, whose ports must stay open,
    uses poll."""
    watched: set[str] = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]":
                watched.update(re.findall(r"tfd:\s*(\d+)", Path(f"/proc/self/fdinfo/{name}").read_text()))
        except FileNotFoundError:
            continue  # closed meanwhile, as the one that lists them
    found = []
    for descriptor in map(int, watched):
        try:
            copy = os.dup(descriptor)
        except OSError:
            continue  # closed meanwhile
        if not stat.S_ISSOCK(os.fstat(copy).st_mode):
            os.close(copy)
            continue
        candidate = socket.socket(fileno=copy)
        if _listens_here(candidate):
            found.append(candidate)
        else:
            candidate.close()
    return found


def _machines() -> list[str]:
    return [address for address in os.environ.get(ADDRESSES_VARIABLE, "").split(",") if address]


def _listens_here(candidate: socket.socket) -> bool:
    if candidate.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    listens = candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    address = candidate.getsockname()[0]
    return bool(listens) and (ipaddress.ip_address(address).is_loopback or address in _machines())


@dataclass(frozen=True, slots=True)
class _Socket:
    """A row of the kernel's table; addresses are as it writes them."""

    local: str
    remote: str
    state: str
    user: int
    inode: int
    """0 where no process has it open."""


def _table() -> list[_Socket]:
    rows = []
    for path in (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6")):
        if path.exists():  # without IPv6 there is no second one
            fields = [line.split() for line in path.read_text().splitlines()[1:]]
            rows += [_Socket(_plain(f[1]), _plain(f[2]), f[3], int(f[7]), int(f[9])) for f in fields]
    return rows


def _plain(address: str) -> str:
    return address.removeprefix(_MAPPED)


def _strangers(listeners: set[int]) -> set[int | None]:
    """Finds users, other than this one, of what is connected to sockets of these inodes; None is nobody any more."""
    table = _table()
    ports = {row.local for row in table if row.state == _LISTEN and row.inode in listeners}
    users = {(row.local, row.remote): row.user for row in table if row.inode}
    connected = [row for row in table if row.local in ports and row.state in (_ESTABLISHED, _CLOSE_WAIT)]
    known = {socket.inet_aton(address)[::-1].hex().upper() for address in _machines()}
    return {
        users.get((row.remote, row.local))
        for row in connected
        if row.remote.partition(":")[0] not in known or (row.remote, row.local) in users
    } - {os.getuid()}
