"""Frames over a stream socket: a message and the tensors that travel with it.

A frame is preceded by its length (4 bytes, big endian). It is 8 bytes (magic, carrier, length of the message, big
endian), the msgpack message, and the tensors as a safetensors file. Tensors of more than 256 KiB together go into
shared memory instead; the frame says where in it they lie, and its descriptor comes with the frame over the AF_UNIX
socket, unless the receiver has mapped it before.

`multiprocessing.connection` would frame bytes as well, but passes no descriptor with them and unpickles by default. Of
it there is only the handshake by which both ends prove that they have the key. Nothing that arrives is ever unpickled.
"""

import contextlib
import os
import socket
import struct
import threading
import time
import weakref
from multiprocessing.connection import answer_challenge, deliver_challenge
from typing import NamedTuple

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError

from ..errors import ProtocolError, RequestError
from .messages import Message
from .shared import ADVICE, Places, SharedMemory, SharedTensors, inline_tensors, room_for
from .tls import TlsStream

_HEADER = struct.Struct(">2sBxI")
_LENGTH = struct.Struct(">I")
_FD = struct.Struct("i")
_MAGIC = b"FU"
_NONE, _INLINE, _SHARED, _LASTING = range(4)

INLINE_LIMIT = 256 * 1024
MAX_FRAME = 1 << 30
"""Upper bound of a frame, in bytes: tensors travel inline where there is no shared memory (TCP, no memfd)."""
_NAMES = 256 * 1024
"""What the names and shapes of a frame's tensors take at most, in bytes."""


class Frame(NamedTuple):
    """What `Channel.write` sends. memory: whose descriptor goes along."""

    data: bytes
    memory: SharedMemory | None = None


class Channel:
    """One end of the control channel, which owns its socket. `receives` is the union of messages this end accepts.

    heard: when the last bytes arrived, by `time.monotonic`.

    Sending is safe from several threads; receiving belongs to one.
    """

    def __init__(self, sock: socket.socket | TlsStream, receives: type, *, limit: int = MAX_FRAME):
        self._socket = sock
        self._socket.settimeout(None)  # whatever default the process has set
        self._decoder = msgspec.msgpack.Decoder(receives)
        self._places = msgspec.msgpack.Decoder(Places)
        self._lasting: SharedMemory | None = None  # what this end writes to
        self._arrived: weakref.ref[SharedMemory] | None = None  # what it was sent, as long as anybody uses it
        self._limit = limit
        self._send_lock = threading.Lock()
        self.heard = time.monotonic()
        self._local = self._socket.family == socket.AF_UNIX
        self.shares_memory = self._local and hasattr(os, "memfd_create")

    @classmethod
    def connect(cls, address: str, receives: type) -> "Channel":
        """The client's end of a channel to the AF_UNIX socket at `address`. Raises OSError where nobody listens."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return cls(sock, receives)

    def authenticate(self, key: bytes, *, listens: bool) -> None:
        """Has both ends prove that they have the key (HMAC), before anything else is sent. listens: this end was
        connected to, and asks first.

        Raises multiprocessing.AuthenticationError where the other end has another key, EOFError or OSError where it
        closed or said something else.
        """
        for challenge in (deliver_challenge, answer_challenge)[:: 1 if listens else -1]:
            challenge(self, key)

    def send(self, message: Message, tensors: dict[str, torch.Tensor] | None = None, *, lasting: bool = False) -> None:
        """`write` of a `frame`."""
        self.write(self.frame(message, tensors, lasting=lasting))

    def frame(
        self, message: Message, tensors: dict[str, torch.Tensor] | None = None, *, lasting: bool = False
    ) -> Frame:
        """A message and its tensors, copied. Frames are written in the order in which they were made.

        lasting: large tensors are written where the last ones sent so lay, which the receiver must have read; it holds
        the memory's `SharedTensors` from one to the next. See `forget`.

        Raises RequestError for more than travels.
        """
        tensors = {name: t.detach() for name, t in (tensors or {}).items()}
        body, nbytes = msgspec.msgpack.encode(message), sum(t.nbytes for t in tensors.values())
        if nbytes > INLINE_LIMIT and self.shares_memory:
            return self._shared_frame(body, tensors, lasting)
        if nbytes + len(body) > MAX_FRAME - _NAMES:
            raise RequestError(
                f"Use smaller images, batches or LoRAs: {nbytes / 1e9:.2f} GB of tensors at a time do not travel "
                f"between machines, {MAX_FRAME / 1e9:.2f} GB would"
            )
        blob = safetensors.torch.save(_standing_alone(tensors)) if tensors else b""
        return Frame(_HEADER.pack(_MAGIC, _INLINE if tensors else _NONE, len(body)) + body + blob)

    def write(self, frame: Frame) -> None:
        """Raises OSError when the other end is gone. Whoever is interrupted here leaves half a frame behind."""
        with self._send_lock:
            data, sent = _LENGTH.pack(len(frame.data)) + frame.data, 0
            if frame.memory is not None:
                sent = socket.send_fds(self._socket, [data], [frame.memory.fd])
            self._socket.sendall(data[sent:])

    def send_bytes(self, data: bytes) -> None:
        """Sends a frame of the handshake, which is no message. Raises as `write`."""
        self.write(Frame(data))

    def recv_bytes(self, most: int) -> bytes:
        """The next frame as it is, of so many bytes at most. Raises as `receive`."""
        frame, fd, _ = self._receive_frame(most)
        _close(fd)
        return frame

    def forget(self) -> None:
        """Gives lasting memory up: the next tensors go into other memory."""
        if self._lasting is not None:
            self._lasting.unpin()
            self._lasting = None

    @property
    def lasting_bytes(self) -> int:
        """The size of the lasting memory that this end writes to; 0 for none."""
        return len(self._lasting.bytes) if self._lasting is not None else 0

    def _shared_frame(self, body: bytes, tensors: dict[str, torch.Tensor], lasting: bool) -> Frame:
        size = room_for(tensors)
        known = lasting and size <= self.lasting_bytes
        if lasting and not known:
            self.forget()
        memory = self._lasting if known else SharedMemory.made(size)
        if lasting and any(t.is_cuda for t in tensors.values()):
            memory.pin()
        places = memory.put(tensors)
        header = _HEADER.pack(_MAGIC, _LASTING if lasting else _SHARED, len(body))
        if lasting:
            self._lasting = memory
        return Frame(header + body + msgspec.msgpack.encode(places), None if known else memory)

    def receive(self) -> tuple[Message, dict[str, torch.Tensor]]:
        """The next message and its tensors.

        Raises EOFError when the other end closed, OSError when the connection broke or the frame was too large (the
        stream is unusable then), ProtocolError when the frame was refused (the next one can still be received).
        """
        frame, fd, lost = self._receive_frame(self._limit)
        try:
            return self._read(frame, fd, lost)
        except (msgspec.MsgspecError, ValueError, SafetensorError, KeyError) as error:
            raise ProtocolError(f"a frame was refused: {error}") from error
        finally:
            _close(fd)

    def _read(self, frame: bytes, fd: int | None, lost: bool) -> tuple[Message, dict[str, torch.Tensor]]:
        if len(frame) < _HEADER.size:
            raise ProtocolError(f"a frame of {len(frame)} bytes is too short")
        magic, carrier, length = _HEADER.unpack_from(frame)
        body, rest = frame[_HEADER.size : _HEADER.size + length], frame[_HEADER.size + length :]
        if magic != _MAGIC or len(body) != length or carrier > _LASTING or (rest and carrier == _NONE):
            raise ProtocolError("a frame has a malformed header")
        message = self._decoder.decode(body)
        if carrier == _NONE:
            return message, {}
        if carrier == _INLINE:
            return message, inline_tensors(rest)
        try:
            if lost:
                raise ProtocolError(f"a frame's shared memory cannot be taken: too many files are open here; {ADVICE}")
            places = self._places.decode(rest)
            return message, SharedTensors(self._memory(fd, lasting=carrier == _LASTING), places)
        except ProtocolError as error:
            error.message = message
            raise

    def _memory(self, fd: int | None, *, lasting: bool) -> SharedMemory:
        if fd is not None:
            memory = SharedMemory(fd, lasting=lasting)
            if lasting:
                self._arrived = weakref.ref(memory)
            return memory
        memory = self._arrived() if lasting and self._arrived is not None else None
        if memory is None:
            raise ProtocolError("a frame announces shared memory but no descriptor came with it")
        return memory

    def _receive_frame(self, most: int) -> tuple[bytes, int | None, bool]:
        """The next frame, the descriptor that came with it, and whether one came that this process could not take."""
        prefix, ancillary, flags = self._begin_frame()
        if not prefix:
            raise EOFError
        fd = next((_FD.unpack(data)[0] for _, kind, data in ancillary if kind == socket.SCM_RIGHTS), None)
        try:
            (length,) = _LENGTH.unpack(prefix + self._receive_exactly(_LENGTH.size - len(prefix)))
            if length > most:
                raise OSError(f"a frame of {length} bytes is too large")
            return self._receive_exactly(length), fd, fd is None and bool(flags & socket.MSG_CTRUNC)
        except BaseException:
            _close(fd)
            raise

    def _begin_frame(self) -> tuple[bytes, list, int]:
        """The next bytes of a frame's length, with what comes beside them, and flags, as `recvmsg` gives them."""
        if not self._local:
            return self._socket.recv(_LENGTH.size), [], 0
        return self._socket.recvmsg(_LENGTH.size, socket.CMSG_LEN(_FD.size))[:3]

    def _receive_exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            part = self._socket.recv(min(length - len(data), 1 << 20))
            if not part:
                raise EOFError
            self.heard = time.monotonic()
            data += part
        return bytes(data)

    def shut(self) -> None:
        """Ends the stream for both ends, and for threads that read or write here."""
        with contextlib.suppress(OSError):  # the other end has done so
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.forget()
        self._socket.close()


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def _standing_alone(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU, contiguous, and no two on the same memory, which safetensors would refuse."""
    alone, storages = {}, set()
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        t = t.clone() if t.untyped_storage().data_ptr() in storages else t
        storages.add(t.untyped_storage().data_ptr())
        alone[name] = t
    return alone
