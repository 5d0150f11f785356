"""How one comes in at a server: TLS with its own certificate, the key's secret, Hello. Clients do, and so do the other
machines of a server, and their ranks."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from pathlib import Path

from .errors import DeviceError, KeyFileError, ProtocolError
from .keyfile import Key
from .protocol import VERSION, Channel, Hello, TlsStream, Welcome

CONNECT_SECONDS = 5.0
"""How long a server may take to say Welcome."""


def enter(address: str, key: str, receives: type) -> tuple[Channel, Welcome, str]:
    """A channel to a server at host:port that has said Welcome, and this end's own address. key: the path of its key
    file. Raises DeviceError where no server answers, KeyFileError or ProtocolError."""
    known = Key.read(Path(key))
    host, _, port = address.rpartition(":")
    try:
        sock = socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS)
    except (OSError, OverflowError, UnicodeError) as error:  # that of a name that no host can have
        raise DeviceError(
            f"Start `python -m fastusp_backend serve --listen {address}` there (machine 0 of several: with --nnodes "
            f"and --rdzv-endpoint {address} in place of --listen), open its port, or correct the address: no server "
            f"answers at {address}: {error}"
        ) from error
    own, stream = sock.getsockname()[0], TlsStream(sock, known.client_context(), listens=False)
    try:
        with limited(sock, CONNECT_SECONDS):
            stream.handshake(known.is_from)
            channel = Channel(stream, receives)
            channel.authenticate(known.secret, listens=False)
            channel.send(Hello(version=VERSION))
            reply, _ = channel.receive()
        if not isinstance(reply, Welcome) or reply.version != VERSION:
            raise ProtocolError(f"Install the same FastUSP here and on {address}: {reply}")
        return channel, reply, own
    except BaseException as error:
        stream.close()
        if isinstance(error, PermissionError | AuthenticationError):
            raise KeyFileError(
                f"Copy the key file from {address} again: {key} is another server's (what it prints as it starts says "
                "where it lies)"
            ) from error
        if isinstance(error, OSError | EOFError):
            why = str(error) or "it closed the connection"
            raise DeviceError(
                f"Look at the server's log, and copy its key file again if it has refused {key}: {address} did not "
                f"answer as a FastUSP server: {why}"
            ) from error
        raise


@contextlib.contextmanager
def limited(sock: socket.socket, seconds: float) -> Iterator[None]:
    """Ends the connection after some seconds, unless it is left before."""
    timer = threading.Timer(seconds, _shut, (sock,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed
        sock.shutdown(socket.SHUT_RDWR)
