"""Frames over a stream socket: a message and the tensors that travel with it.

A frame is preceded by its length (4 bytes, big endian). It is 12 bytes (magic, carrier, lengths of the message and of
the places, big endian), the msgpack message, in msgpack the places of the tensors, and at the next multiple of 256
bytes the tensors, which are received as they lie. Tensors of more than 256 KiB together go into shared memory instead,
whose descriptor comes with the frame over the AF_UNIX socket, unless the receiver has mapped it before.

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
import torch

from ..errors import ProtocolError, RequestError
from .messages import Message
from .shared import ADVICE, Places, SharedMemory, SharedTensors, aligned, found, placed, put
from .tls import TlsStream

_HEADER = struct.Struct(">2sBxII")
_LENGTH = struct.Struct(">I")
_FD = struct.Struct("i")
_MAGIC = b"FU"
_NONE, _INLINE, _SHARED, _LASTING = range(4)
_FRONT = aligned(_LENGTH.size)
"""Before a frame with tensors in its sender's memory: its length, at the end of that."""

INLINE_LIMIT = 256 * 1024
MAX_FRAME = 1 << 30
"""Upper bound of a frame, in bytes: tensors travel inline where there is no shared memory (TCP, no memfd)."""


class Frame(NamedTuple):
    """What `Channel.write` sends. data: with its length in front. memory: whose descriptor goes along."""

    data: bytes | memoryview
    memory: SharedMemory | None = None

    @property
    def nbytes(self) -> int:
        """What it holds until it is sent."""
        return len(self.data) + (len(self.memory.bytes) if self.memory is not None else 0)


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

        Raises RequestError for more than travels, and for a tensor of a type that does not.
        """
        tensors = {name: t.detach() for name, t in (tensors or {}).items()}
        body, (places, size) = msgspec.msgpack.encode(message), placed(tensors)
        if not tensors:
            return _bytes_frame(_head(_NONE, body))
        if size > INLINE_LIMIT and self.shares_memory:
            return self._shared_frame(body, tensors, places, size, lasting)
        head = _head(_INLINE, body, msgspec.msgpack.encode(places))
        length = aligned(len(head)) + size
        if length > MAX_FRAME:
            raise RequestError(
                f"Use smaller images, batches or LoRAs: {size / 1e9:.2f} GB of tensors at a time do not travel "
                f"between machines, {MAX_FRAME / 1e9:.2f} GB would"
            )
        whole = torch.empty(_FRONT + length, dtype=torch.uint8)
        put(tensors, places, whole[_FRONT + aligned(len(head)) :])
        data = memoryview(whole.numpy())[_FRONT - _LENGTH.size :]
        data[: _LENGTH.size + len(head)] = _LENGTH.pack(length) + head
        return Frame(data)

    def write(self, frame: Frame) -> None:
        """Raises OSError when the other end is gone. Whoever is interrupted here leaves half a frame behind."""
        with self._send_lock:
            sent = 0
            if frame.memory is not None:
                sent = socket.send_fds(self._socket, [frame.data], [frame.memory.fd])
            self._socket.sendall(memoryview(frame.data)[sent:])

    def send_bytes(self, data: bytes) -> None:
        """Sends a frame of the handshake, which is no message. Raises as `write`."""
        self.write(_bytes_frame(data))

    def recv_bytes(self, most: int) -> bytes:
        """The next frame as it is, of so many bytes at most. Raises as `receive`."""
        frame, fd, _ = self._receive_frame(most)
        _close(fd)
        return bytes(frame.numpy())

    def forget(self) -> None:
        """Gives lasting memory up: the next tensors go into other memory."""
        if self._lasting is not None:
            self._lasting.unpin()
            self._lasting = None

    @property
    def lasting_bytes(self) -> int:
        """The size of the lasting memory that this end writes to; 0 for none."""
        return len(self._lasting.bytes) if self._lasting is not None else 0

    def _shared_frame(
        self, body: bytes, tensors: dict[str, torch.Tensor], places: Places, size: int, lasting: bool
    ) -> Frame:
        known = lasting and size <= self.lasting_bytes
        if lasting and not known:
            self.forget()
        memory = self._lasting if known else SharedMemory.made(size)
        if lasting and any(t.is_cuda for t in tensors.values()):
            memory.pin()
        put(tensors, places, memory.bytes)
        if lasting:
            self._lasting = memory
        head = _head(_LASTING if lasting else _SHARED, body, msgspec.msgpack.encode(places))
        return _bytes_frame(head, None if known else memory)

    def receive(self) -> tuple[Message, dict[str, torch.Tensor]]:
        """The next message and its tensors.

        Raises EOFError when the other end closed, OSError when the connection broke or the frame was too large (the
        stream is unusable then), ProtocolError when the frame was refused (the next one can still be received).
        """
        frame, fd, lost = self._receive_frame(self._limit)
        try:
            return self._read(frame, fd, lost)
        except (msgspec.MsgspecError, ValueError) as error:
            raise ProtocolError(f"a frame was refused: {error}") from error
        finally:
            _close(fd)

    def _read(self, frame: torch.Tensor, fd: int | None, lost: bool) -> tuple[Message, dict[str, torch.Tensor]]:
        data = memoryview(frame.numpy())
        if len(data) < _HEADER.size:
            raise ProtocolError(f"a frame of {len(data)} bytes is too short")
        magic, carrier, length, listed = _HEADER.unpack_from(data)
        end = _HEADER.size + length + listed
        whole = len(data) >= end if carrier == _INLINE else len(data) == end
        if magic != _MAGIC or carrier > _LASTING or not whole or (listed and carrier == _NONE):
            raise ProtocolError("a frame has a malformed header")
        message = self._decoder.decode(data[_HEADER.size : _HEADER.size + length])
        if carrier == _NONE:
            return message, {}
        if carrier == _INLINE:
            places = self._places.decode(data[end - listed : end])
            return message, found(places, frame[aligned(end) :])
        try:
            if lost:
                raise ProtocolError(f"a frame's shared memory cannot be taken: too many files are open here; {ADVICE}")
            places = self._places.decode(data[end - listed :])
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

    def _receive_frame(self, most: int) -> tuple[torch.Tensor, int | None, bool]:
        """The next frame, as bytes, the descriptor that came with it, and whether one came that this process could not
        take."""
        prefix, ancillary, flags = self._begin_frame()
        if not prefix:
            raise EOFError
        fd = next((_FD.unpack(data)[0] for _, kind, data in ancillary if kind == socket.SCM_RIGHTS), None)
        try:
            rest = bytearray(_LENGTH.size - len(prefix))
            self._fill(memoryview(rest))
            (length,) = _LENGTH.unpack(prefix + rest)
            if length > most:
                raise OSError(f"a frame of {length} bytes is too large")
            frame = torch.empty(length, dtype=torch.uint8)  # where torch aligns it: products sum alike each time
            self._fill(memoryview(frame.numpy()))
            return frame, fd, fd is None and bool(flags & socket.MSG_CTRUNC)
        except BaseException:
            _close(fd)
            raise

    def _begin_frame(self) -> tuple[bytes, list, int]:
        """The next bytes of a frame's length, with what comes beside them, and flags, as `recvmsg` gives them."""
        if not self._local:
            return self._socket.recv(_LENGTH.size), [], 0
        return self._socket.recvmsg(_LENGTH.size, socket.CMSG_LEN(_FD.size))[:3]

    def _fill(self, buffer: memoryview) -> None:
        while buffer:
            count = self._socket.recv_into(buffer)
            if not count:
                raise EOFError
            self.heard = time.monotonic()
            buffer = buffer[count:]

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


def _head(carrier: int, body: bytes, places: bytes = b"") -> bytes:
    return _HEADER.pack(_MAGIC, carrier, len(body), len(places)) + body + places


def _bytes_frame(data: bytes, memory: SharedMemory | None = None) -> Frame:
    return Frame(_LENGTH.pack(len(data)) + data, memory)
