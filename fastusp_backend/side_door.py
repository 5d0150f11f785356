"""The way in for a client on the server's own machine: a Unix socket, over which descriptors of shared memory pass.

An address does not tell who shares memory: containers may have one in common, and a tunnel makes another machine's look
like this one's. So it is tried. For each client that comes in over TLS the server listens at a name of chance, until
that client has been let in or not. Who connects there, and is the same user's, is sent memory of random content, and
the client says over TLS what it has read in it. If it is right, the Unix socket takes the connection's place.

The name is an abstract one, of the network namespace: there is no file that could be another's, or be left behind. The
socket and the memory go with the processes that have them, however these end.
"""

import contextlib
import hmac
import logging
import os
import re
import secrets
import socket
import struct

from .errors import ProtocolError, RequestError
from .protocol import Channel, Found, SharedMemory

log = logging.getLogger(__name__)

SECONDS = 5.0
"""How long a client waits for what it is to read."""
_CONTENT = 32
_NAME = re.compile(r"fastusp-[0-9a-f]{32}")
_CREDENTIALS = struct.Struct("3i")  # process, user, group
_BACKLOG = 16


class SideDoor:
    """The server's end. name: what the client is told, over TLS; empty where the system has no such memory."""

    def __init__(self):
        self.name, self._listener = "", None
        if hasattr(os, "memfd_create"):
            self.name = f"fastusp-{secrets.token_hex(_CONTENT // 2)}"
            try:
                self._listener = socket.socket(socket.AF_UNIX)
                self._listener.bind(f"\0{self.name}")
                self._listener.listen(_BACKLOG)
                self._listener.setblocking(False)
            except OSError as error:
                log.warning("Raise `ulimit -n`: clients of this machine send tensors inside TLS meanwhile (%s)", error)
                self.close()
                self.name, self._listener = "", None

    def let_in(self, channel: Channel) -> socket.socket | None:
        """The socket of the client at the other end of `channel`, which has said that it has connected; None where it
        cannot have what lies in memory of this process.

        Raises ProtocolError for a wrong answer, EOFError or OSError where the client is gone.
        """
        content = secrets.token_bytes(_CONTENT)
        with contextlib.ExitStack() as not_let_in:
            sock = self._accept()
            self.close()  # who waits there still is told so
            if sock is not None:
                not_let_in.callback(sock.close)
                _show(sock, content)
            found, _ = channel.receive()
            if not isinstance(found, Found):
                raise ProtocolError(f"expected Found, got {found}")
            if sock is not None and hmac.compare_digest(found.content, content):
                not_let_in.pop_all()
                return sock
            if found.content:
                raise ProtocolError("Install the same FastUSP here and on the server: it has found other content")
            return None

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def __enter__(self) -> "SideDoor":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _accept(self) -> socket.socket | None:
        """The first that is of the same user."""
        with contextlib.suppress(OSError):  # there is none more, or no more files: it stays inside TLS
            while self._listener is not None:
                sock, _ = self._listener.accept()
                if _is_ours(sock):
                    return sock
                sock.close()
        return None


def find(name: str) -> socket.socket | None:
    """Connected to the server that has told this name; None where there is none of it, or another user's, on this
    machine. Raises ProtocolError for a name that is no side door's."""
    if not name:
        return None
    if not _NAME.fullmatch(name):
        raise ProtocolError(f"Install the same FastUSP here and on the server: {name!r} is no name of a socket of its")
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(SECONDS)
        sock.connect(f"\0{name}")
        if not _is_ours(sock):
            raise PermissionError(name)
        return sock
    except OSError:  # mostly, as it is another machine, or namespace
        sock.close()
        return None


def look(sock: socket.socket) -> bytes:
    """What lies in the memory that the server shows; empty where nothing is shown, or this process cannot map it."""
    fds = []
    try:
        _, fds, _, _ = socket.recv_fds(sock, 1, 1)
        if not fds:
            return b""
        return SharedMemory(fds[0], lasting=True).bytes[:_CONTENT].numpy().tobytes()
    except (OSError, ProtocolError):
        return b""
    finally:
        for fd in fds:
            os.close(fd)


def _show(sock: socket.socket, content: bytes) -> None:
    try:
        memory = SharedMemory.made(len(content))
        memoryview(memory.bytes.numpy())[:] = content
        socket.send_fds(sock, [b"\0"], [memory.fd])
    except (OSError, RequestError):  # it is gone, or too many files are open: what it says over TLS tells
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _is_ours(sock: socket.socket) -> bool:
    """Whether the other end is of this process' user, by the system's word."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(credentials)[1] == os.geteuid()
