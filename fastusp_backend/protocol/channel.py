"""Frames over a `multiprocessing.connection`: a message and the tensors that travel with it.

A frame is one `send_bytes`: 8 bytes (magic, carrier, length of the message, big endian), the msgpack message, and the
tensors as a safetensors file. Tensors of more than 256 KiB together go into an anonymous shared-memory file instead,
whose descriptor follows the frame on the same AF_UNIX socket: it has no name that could outlive a killed process.
Nothing that arrives is ever unpickled.
"""

import array
import fcntl
import os
import socket
import struct
import threading
from multiprocessing.connection import Connection

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError

from ..errors import ProtocolError
from .messages import Message

_HEADER = struct.Struct(">2sBxI")
_MAGIC = b"FU"
_NONE, _INLINE, _SHARED = range(3)

INLINE_LIMIT = 256 * 1024
MAX_FRAME = 1 << 30
"""Upper bound of a frame, in bytes: tensors travel inline where shared memory is not to be had (TCP, no memfd)."""


class Channel:
    """One end of the control channel. `receives` is the union of messages this end accepts.

    Sending is safe from several threads; receiving belongs to one.
    """

    def __init__(self, connection: Connection, receives: type, *, limit: int = MAX_FRAME):
        self._connection = connection
        self._decoder = msgspec.msgpack.Decoder(receives)
        self._limit = limit
        self._send_lock = threading.Lock()
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        self.shares_memory = self._socket.family == socket.AF_UNIX and hasattr(os, "memfd_create")

    def send(self, message: Message, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Raises OSError when the other end is gone."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in (tensors or {}).items()}
        size = sum(t.nbytes for t in tensors.values())
        carrier = _NONE if not tensors else _SHARED if size > INLINE_LIMIT and self.shares_memory else _INLINE
        body = msgspec.msgpack.encode(message)
        frame = _HEADER.pack(_MAGIC, carrier, len(body)) + body
        blob = safetensors.torch.save(tensors) if tensors else b""
        with self._send_lock:
            if carrier != _SHARED:
                self._connection.send_bytes(frame + blob)
                return
            fd = os.memfd_create("fastusp", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                with os.fdopen(fd, "wb", closefd=False) as file:
                    file.write(blob)
                # Sealed, so that a receiver's mapping cannot be cut short under its feet.
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
                self._connection.send_bytes(frame)
                socket.send_fds(self._socket, [_MAGIC[:1]], [fd])
            finally:
                os.close(fd)

    def poll(self, seconds: float) -> bool:
        """Whether a frame (or the end of the stream) waits. Raises OSError when the connection broke."""
        return self._connection.poll(seconds)

    def receive(self) -> tuple[Message, dict[str, torch.Tensor]]:
        """The next message and its tensors.

        Raises EOFError when the other end closed, OSError when the connection broke or the frame was too large (the
        stream is unusable then), ProtocolError when the frame was refused (the next one can still be received).
        """
        frame = self._connection.recv_bytes(self._limit)
        if len(frame) < _HEADER.size:
            raise ProtocolError(f"a frame of {len(frame)} bytes is too short")
        magic, carrier, length = _HEADER.unpack_from(frame)
        body, blob = frame[_HEADER.size : _HEADER.size + length], frame[_HEADER.size + length :]
        if magic != _MAGIC or len(body) != length or carrier > _SHARED:
            raise ProtocolError("a frame has a malformed header")
        try:
            # The descriptor is read before anything can be refused: it must not stay in the stream.
            tensors = self._receive_shared() if carrier == _SHARED else {}
            if carrier == _INLINE:
                tensors = safetensors.torch.load(blob)
            return self._decoder.decode(body), tensors
        except (msgspec.MsgspecError, ValueError, SafetensorError, KeyError) as error:
            raise ProtocolError(f"a frame was refused: {error}") from error

    def _receive_shared(self) -> dict[str, torch.Tensor]:
        if not self.shares_memory:
            raise ProtocolError("a frame announces shared memory, which this connection cannot carry")
        fds = array.array("i")
        _, received, _, _ = socket.recv_fds(self._socket, 1, 1)
        fds.extend(received)
        if not fds:
            raise ProtocolError("a frame announces shared memory but no descriptor followed")
        try:
            if not fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise ProtocolError("a frame's shared memory is not sealed")
            return safetensors.torch.load_file(f"/proc/self/fd/{fds[0]}")
        except OSError as error:
            raise ProtocolError(f"a frame's descriptor is no shared memory: {error}") from error
        finally:
            for fd in fds:
                os.close(fd)

    def close(self) -> None:
        self._socket.close()
        self._connection.close()
