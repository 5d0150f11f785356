"""A client's channel, a worker's, and what no channel would send: for the tests of the control channel."""

import fcntl
import os
import socket
import struct
from multiprocessing.connection import wait

import msgspec
import pytest
from support import SOME_FILE

from fastusp_backend.config import Layout, ModelSpec, Settings
from fastusp_backend.errors import ProtocolError
from fastusp_backend.protocol import (
    VERSION,
    Cancel,
    Channel,
    Done,
    Evaluate,
    Failed,
    Held,
    Hello,
    Park,
    Phase,
    Ready,
    Release,
    Sample,
    Shutdown,
    Step,
    Unmap,
)
from fastusp_backend.protocol.messages import ToClient, ToWorker

WHAT = {
    "model": ModelSpec(path="/models/flux.safetensors", file=SOME_FILE, storage=None, compute="bfloat16"),
    "layout": Layout(ulysses=2, ring=3),
    "settings": Settings(wire="exact", attention="math"),
}
TO_WORKER = [
    Hello(version=VERSION),
    Sample(id=1, **WHAT, sampler="euler_ancestral", options={"eta": 0.5}, timestep_scale=1.0, cfg=3.5),
    Evaluate(id=2, **WHAT, keep={"context": 3}, reuse={"y": 1}, forget=[0, 2]),
    Evaluate(id=2, **WHAT),
    Cancel(id=1 << 40),
    Release(id=4),
    Park(id=5),
    Unmap(id=6),
    Shutdown(),
]
TO_CLIENT = [
    Ready(version=VERSION, devices=["a", "b"], pids=[1, 2], torch="2.13", backend="gloo"),
    Phase(id=1, text="loading the model: größer"),
    Held(id=1, model=WHAT["model"], state="parked", nbytes=1 << 40, transport="gloo", weights=""),
    Held(id=1, model=None, state="none", nbytes=0, transport="", weights=""),
    Step(id=1, index=0, total=4, sigma=0.123456789, seconds=1e-9),
    Done(id=1),
    Failed(id=None, kind="protocol", rank=0, text="no"),
    Failed(id=1, kind="out_of_memory", rank=3, text=""),
]
NONE, INLINE, SHARED, LASTING = range(4)
SENTINEL = Cancel(id=987654321)


class Pair:
    """A client's channel and a worker's, and the client's bare socket for what a channel would not send."""

    def __init__(self, **options):
        self.bare, self._other = socket.socketpair()
        self.client = Channel(self.bare, ToClient)
        self.worker = Channel(self._other, ToWorker, **options)

    def send_bytes(self, data: bytes) -> None:
        self.client.send_bytes(data)

    def send_with(self, fd: int, data: bytes) -> None:
        """A frame with a descriptor."""
        assert socket.send_fds(self.bare, [struct.pack(">I", len(data)) + data], [fd]) == len(data) + 4

    def waits(self) -> bool:
        """Whether a frame, or the end of the stream, is there for the worker."""
        return bool(wait([self._other], 0))

    def close(self) -> None:
        self.client.close()
        self.worker.close()


def header(carrier: int, length: int, listed: int = 0, magic: bytes = b"FU") -> bytes:
    return struct.pack(">2sBxII", magic, carrier, length, listed)


def frame(message: object, *, carrier: int = NONE, places: bytes = b"", blob: bytes = b"") -> bytes:
    """blob: the tensors, where they lie behind the message."""
    body = msgspec.msgpack.encode(message)
    head = header(carrier, len(body), len(places)) + body + places
    return head + bytes(-len(head) % 256) + blob if blob else head


def recorded_frame(message, tensors=None) -> bytes:
    """What Channel.send writes for a message that travels inline."""
    pair = Pair()
    pair.client.send(message, tensors)
    data = pair.worker.recv_bytes(1 << 20)
    pair.close()
    return data


def assert_refused_in_place(pair: Pair) -> None:
    """What was sent is refused, and a message after it still arrives."""
    pair.client.send(SENTINEL)
    with pytest.raises(ProtocolError):
        pair.worker.receive()
    assert pair.worker.receive() == (SENTINEL, {})
    assert not pair.waits()


def memory(content: bytes, *, sealed: bool) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


PLACES = msgspec.msgpack.encode({"x": ["float32", [3], 0]})
CONTENT = struct.pack("3f", 1, 1, 1)
"""What `PLACES` finds in shared memory."""
