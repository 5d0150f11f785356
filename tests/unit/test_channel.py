"""The control channel carries every message and tensor exactly, and refuses anything else without losing its place."""

import fcntl
import gc
import os
import random
import socket
import struct
from multiprocessing import Pipe

import msgspec
import pytest
import torch
from support import open_descriptors, randn

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
)
from fastusp_backend.protocol.channel import INLINE_LIMIT
from fastusp_backend.protocol.messages import ToClient, ToWorker

pytestmark = pytest.mark.unit

WHAT = {
    "model": ModelSpec(
        path="/models/flux.safetensors", mtime_ns=1 << 60, size=1 << 35, storage=None, compute="bfloat16"
    ),
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
    Shutdown(),
]
TO_CLIENT = [
    Ready(version=VERSION, devices=["a", "b"], pids=[1, 2], torch="2.13", transport="gloo"),
    Phase(id=1, text="loading the model: größer"),
    Held(id=1, model=WHAT["model"], state="parked", nbytes=1 << 40, exchanges="gloo"),
    Held(id=1, model=None, state="none", nbytes=0, exchanges=""),
    Step(id=1, index=0, total=4, sigma=0.123456789, seconds=1e-9),
    Done(id=1),
    Failed(id=None, kind="protocol", rank=0, text="no"),
    Failed(id=1, kind="out_of_memory", rank=3, text=""),
]
NONE, INLINE, SHARED = range(3)
SENTINEL = Cancel(id=987654321)


class Pair:
    """A client's channel and a worker's, and the client's bare connection for what a channel would not send."""

    def __init__(self, **options):
        self.bare, other = Pipe()
        self.client = Channel(self.bare, ToClient)
        self.worker = Channel(other, ToWorker, **options)

    def send_bytes(self, data: bytes) -> None:
        self.bare.send_bytes(data)

    def send_with(self, fd: int, data: bytes) -> None:
        """A frame with a descriptor."""
        with socket.socket(fileno=os.dup(self.bare.fileno())) as sock:
            assert socket.send_fds(sock, [struct.pack("!i", len(data)) + data], [fd]) == len(data) + 4

    def close(self) -> None:
        self.client.close()
        self.worker.close()


@pytest.fixture
def pair():
    pair = Pair()
    yield pair
    pair.close()


def header(carrier: int, length: int, magic: bytes = b"FU") -> bytes:
    return struct.pack(">2sBxI", magic, carrier, length)


def frame(message: object, *, carrier: int = NONE, blob: bytes = b"") -> bytes:
    body = msgspec.msgpack.encode(message)
    return header(carrier, len(body)) + body + blob


def recorded_frame(message, tensors=None) -> bytes:
    """What Channel.send writes for a message that travels inline."""
    ours, other = Pipe()
    channel = Channel(ours, ToClient)
    channel.send(message, tensors)
    data = other.recv_bytes()
    channel.close()
    other.close()
    return data


def assert_refused_in_place(pair: Pair) -> None:
    """What was sent is refused, and a message after it still arrives."""
    pair.client.send(SENTINEL)
    with pytest.raises(ProtocolError):
        pair.worker.receive()
    assert pair.worker.receive() == (SENTINEL, {})
    assert not pair.worker.poll(0)


@pytest.mark.parametrize("message", TO_WORKER, ids=lambda m: type(m).__name__)
def test_requests_arrive(pair, message):
    pair.client.send(message)
    assert pair.worker.receive() == (message, {})


@pytest.mark.parametrize("message", TO_CLIENT, ids=lambda m: type(m).__name__)
def test_replies_arrive(pair, message):
    pair.worker.send(message)
    assert pair.client.receive() == (message, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [5, INLINE_LIMIT])
def test_tensors_arrive_bit_exact(pair, dtype, count):
    bits = torch.randint(-(2**15), 2**15, (count,), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40, 6e-8]).to(dtype)
    tensors = {
        "special": special,
        "random": bits.view(dtype) if dtype != torch.float32 else bits.repeat(2).view(dtype),
        "transposed": randn(3, 7, seed=1).to(dtype).T,
        "scalar": torch.tensor(2.5, dtype=dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
    }
    expected = {name: t.clone() for name, t in tensors.items()}
    pair.client.send(TO_WORKER[1], tensors)
    message, arrived = pair.worker.receive()
    assert message == TO_WORKER[1]
    assert arrived.keys() == expected.keys()
    whole = {torch.float32: torch.int32}.get(dtype, torch.int16)
    for name, tensor in expected.items():
        assert arrived[name].dtype == dtype and arrived[name].shape == tensor.shape
        assert torch.equal(arrived[name].contiguous().view(whole), tensor.contiguous().view(whole)), name


def test_large_tensors_travel_in_shared_memory_and_outlive_the_sender():
    pair = Pair(limit=4096)
    sent = randn(300, 1024, seed=2)
    pair.client.send(SENTINEL, {"x": sent})
    _, arrived = pair.worker.receive()
    pair.close()
    gc.collect()
    assert torch.equal(arrived["x"], sent)


def test_tensors_on_the_same_memory_arrive(pair):
    x = randn(4, 6, seed=3)
    pair.client.send(SENTINEL, {"whole": x, "again": x, "part": x[1:3]})
    _, arrived = pair.worker.receive()
    assert (
        torch.equal(arrived["whole"], x) and torch.equal(arrived["again"], x) and torch.equal(arrived["part"], x[1:3])
    )


def test_a_channel_takes_its_own_direction_alone(pair):
    pair.client.send(Done(id=1))
    assert_refused_in_place(pair)


def test_random_bytes_are_refused(pair):
    numbers = random.Random(0)
    for _ in range(500):
        pair.send_bytes(numbers.randbytes(numbers.randrange(0, 200)))
        assert_refused_in_place(pair)
        pair.send_bytes(header(numbers.randrange(2), 40) + numbers.randbytes(numbers.randrange(40, 90)))
        assert_refused_in_place(pair)


@pytest.mark.parametrize("tensors", [None, {"x": torch.ones(3, 5)}], ids=["message", "tensors"])
@pytest.mark.parametrize("message", TO_WORKER, ids=lambda m: type(m).__name__)
def test_flipped_bits_never_desynchronise(pair, message, tensors):
    valid = recorded_frame(message, tensors)
    numbers = random.Random(len(valid))
    refused = 0
    for _ in range(400):
        flipped = bytearray(valid)
        for _ in range(numbers.choice((1, 1, 1, 2, 8))):
            flipped[numbers.randrange(len(flipped))] ^= 1 << numbers.randrange(8)
        pair.send_bytes(bytes(flipped))
        pair.client.send(SENTINEL)
        try:
            pair.worker.receive()
        except ProtocolError:
            refused += 1
        assert pair.worker.receive() == (SENTINEL, {})
    assert refused > 40


@pytest.mark.parametrize("message", TO_WORKER, ids=lambda m: type(m).__name__)
def test_truncated_frames_are_refused(pair, message):
    valid = recorded_frame(message, {"x": torch.ones(3)})
    for length in range(len(valid)):
        pair.send_bytes(valid[:length])
        assert_refused_in_place(pair)


@pytest.mark.parametrize(
    "content",
    [
        {"type": "Unknown", "id": 1},
        {"id": 1},
        {"type": "Cancel"},
        {"type": "Cancel", "id": 1, "more": 2},
        {"type": "Cancel", "id": "1"},
        {"type": "Cancel", "id": None},
        {"type": 3, "id": 1},
        {"type": "Message"},
        {"type": "Request", "id": 1},
        ["Cancel", 1],
        None,
        "Shutdown",
    ],
    ids=str,
)
def test_unknown_messages_are_refused(pair, content):
    pair.send_bytes(frame(content))
    assert_refused_in_place(pair)


@pytest.mark.parametrize(
    "body",
    [
        b"\x91" * 100_000,
        b"\x81\xa4type\xa6Cancel\x00",
        b"\x82\xa4type\xa6Cancel\xa2id\xc1",
        b"\xdf\xff\xff\xff\xff",
        b"",
    ],
    ids=["deep", "trailing", "no msgpack", "endless map", "empty"],
)
def test_hostile_msgpack_is_refused(pair, body):
    pair.send_bytes(header(NONE, len(body)) + body)
    assert_refused_in_place(pair)


@pytest.mark.parametrize(
    "lie",
    [
        frame(SENTINEL, carrier=SHARED),
        frame(SENTINEL, carrier=SHARED, blob=b"12345678"),
        frame(SENTINEL, carrier=INLINE),
        frame(SENTINEL, carrier=NONE, blob=b"12345678"),
        frame(SENTINEL, carrier=INLINE, blob=b"\xff" * 64),
        frame(SENTINEL, carrier=INLINE, blob=(2**62).to_bytes(8, "little") + b"{}"),
        frame(SENTINEL, carrier=3),
        frame(SENTINEL, carrier=255),
        header(NONE, 2**32 - 1) + b"\x80",
        header(NONE, 1, magic=b"fu") + b"\x80",
    ],
    ids=["no fd", "no fd, blob", "no blob", "blob", "garbage", "huge", "carrier 3", "carrier 255", "length", "magic"],
)
def test_a_header_that_lies_is_refused(pair, lie):
    pair.send_bytes(lie)
    assert_refused_in_place(pair)


@pytest.mark.parametrize(
    "blob",
    [
        b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}',
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,800]}}',
        b'{"x":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}',
        b'{"x":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}, "y": 3}',
        b'{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}',
        b'{"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}',
    ],
)
@pytest.mark.parametrize("carrier", [INLINE, SHARED])
def test_tensors_that_lie_are_refused(pair, blob, carrier):
    blob = len(blob).to_bytes(8, "little") + blob + b"12345678"
    if carrier == INLINE:
        pair.send_bytes(frame(SENTINEL, carrier=INLINE, blob=blob))
    else:
        fd = memory(blob, sealed=True)
        pair.send_with(fd, frame(SENTINEL, carrier=SHARED))
        os.close(fd)
    assert_refused_in_place(pair)


def memory(content: bytes, *, sealed: bool) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def tensor_file() -> bytes:
    valid = recorded_frame(SENTINEL, {"x": torch.ones(3)})
    return valid[len(frame(SENTINEL)) :]


def test_a_crafted_descriptor_is_taken_when_it_is_sealed(pair):
    """The tests of refused descriptors below differ from this one in the descriptor alone."""
    fd = memory(tensor_file(), sealed=True)
    pair.send_with(fd, frame(SENTINEL, carrier=SHARED))
    os.close(fd)
    message, tensors = pair.worker.receive()
    assert message == SENTINEL and torch.equal(tensors["x"], torch.ones(3))


@pytest.mark.parametrize("kind", ["unsealed", "file", "pipe", "empty", "garbage"])
def test_other_descriptors_are_refused(pair, tmp_path, kind):
    spare = []
    if kind == "file":
        (tmp_path / "file").write_bytes(tensor_file())
        fd = os.open(tmp_path / "file", os.O_RDONLY)
    elif kind == "pipe":
        fd, other = os.pipe()
        spare.append(other)
    else:
        content = {"unsealed": tensor_file(), "empty": b"", "garbage": b"\xff" * 100}[kind]
        fd = memory(content, sealed=kind != "unsealed")
    pair.send_with(fd, frame(SENTINEL, carrier=SHARED))
    for open_fd in (fd, *spare):
        os.close(open_fd)
    assert_refused_in_place(pair)


@pytest.mark.parametrize(
    "start", [header(SHARED, 10, magic=b"XX"), header(SHARED, 99), header(7, 10), header(NONE, 10)]
)
def test_a_refused_header_takes_its_descriptor_along(pair, start):
    fd = memory(tensor_file(), sealed=True)
    before = open_descriptors()
    pair.send_with(fd, start + b"\xc0" * 10)
    assert_refused_in_place(pair)
    assert open_descriptors() == before
    os.close(fd)


def test_an_oversized_frame_breaks_the_stream():
    pair = Pair(limit=1000)
    pair.send_bytes(bytes(1001))
    with pytest.raises(OSError):
        pair.worker.receive()
    pair.close()


def test_the_end_of_the_stream_is_told(pair):
    pair.client.send(SENTINEL)
    pair.client.close()
    assert pair.worker.receive() == (SENTINEL, {})
    assert pair.worker.poll(0)
    with pytest.raises(EOFError):
        pair.worker.receive()
    with pytest.raises(OSError):
        pair.worker.send(Done(id=1))


def test_no_descriptor_leaks(tmp_path):
    large = {"x": torch.zeros(INLINE_LIMIT)}
    gc.collect()
    before = open_descriptors()
    for _ in range(3):
        pair = Pair()
        for _ in range(10):
            pair.client.send(SENTINEL, large)
            assert pair.worker.receive()[0] == SENTINEL
            for content, sealed in ((tensor_file(), False), (b"garbage", True)):
                fd = memory(content, sealed=sealed)
                pair.send_with(fd, frame(SENTINEL, carrier=SHARED))
                assert_refused_in_place(pair)
                pair.send_with(fd, header(9, 0))
                os.close(fd)
                assert_refused_in_place(pair)
        pair.close()
    gc.collect()
    assert open_descriptors() == before
