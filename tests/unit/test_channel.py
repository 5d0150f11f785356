"""The control channel carries every message and tensor exactly, and leaks no descriptor."""

import gc
import os
import resource

import pytest
import torch
from channels import (
    CONTENT,
    PLACES,
    SENTINEL,
    SHARED,
    TO_CLIENT,
    TO_WORKER,
    Pair,
    assert_refused_in_place,
    frame,
    header,
    memory,
)
from support import open_descriptors, randn

from fastusp_backend.errors import ProtocolError
from fastusp_backend.protocol import Done, SharedMemory, SharedTensors
from fastusp_backend.protocol.channel import INLINE_LIMIT

pytestmark = pytest.mark.unit


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


def test_lasting_memory_travels_once(pair):
    """Until larger tensors come, or either end lets go of it."""
    large = {"x": randn(300, 1024, seed=0), "y": randn(7, seed=1).bfloat16()}
    held = []

    def arrive(tensors, *, new: bool) -> None:
        pair.client.send(SENTINEL, tensors, lasting=True)
        _, arrived = pair.worker.receive()
        assert arrived.keys() == tensors.keys()
        assert all(torch.equal(arrived[name], t) for name, t in tensors.items())
        assert (not held or arrived.memory is not held[-1].memory) is new
        held.append(arrived)

    arrive(large, new=True)
    arrive({name: t + 1 for name, t in large.items()}, new=False)
    assert torch.equal(held[0]["x"], large["x"] + 1)  # the same bytes
    pair.client.send(SENTINEL, {"x": large["y"]}, lasting=True)
    assert type(pair.worker.receive()[1]) is dict  # small ones travel inline
    arrive({"x": large["x"][:100]}, new=False)
    arrive({"x": large["x"].repeat(2, 1)}, new=True)
    arrive({"x": large["x"].T}, new=False)
    pair.client.send(SENTINEL, large)
    assert not pair.worker.receive()[1].memory.lasting
    arrive(large, new=False)
    pair.client.forget()
    arrive(large, new=True)


def test_lasting_memory_that_the_receiver_has_let_go_of_is_missed(pair):
    large = {"x": torch.ones(INLINE_LIMIT)}
    pair.client.send(SENTINEL, large, lasting=True)
    assert pair.worker.receive()[1].memory.lasting
    gc.collect()
    pair.client.send(SENTINEL, large, lasting=True)
    assert_refused_in_place(pair)


def test_what_a_receiver_writes_to_other_memory_is_its_own(pair):
    large = {"x": torch.ones(INLINE_LIMIT)}
    pair.client.send(SENTINEL, large)
    _, arrived = pair.worker.receive()
    again = SharedTensors(SharedMemory(arrived.memory.fd, lasting=False), arrived.places)
    arrived["x"].zero_()
    assert torch.equal(again["x"], large["x"])


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
    assert pair.waits()
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
            pair.client.send(SENTINEL, large, lasting=True)
            held = pair.worker.receive()
            assert held[0] == SENTINEL
            for content, sealed in ((CONTENT, False), (b"garbage", True)):
                fd = memory(content, sealed=sealed)
                pair.send_with(fd, frame(SENTINEL, carrier=SHARED, places=PLACES))
                assert_refused_in_place(pair)
                pair.send_with(fd, header(9, 0))
                os.close(fd)
                assert_refused_in_place(pair)
        pair.close()
    del held
    gc.collect()
    assert open_descriptors() == before


@pytest.fixture
def no_descriptors_left():
    """Sets how many more files this process may open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def leave(count: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        free = [os.open("/", os.O_RDONLY) for _ in range(count + 1)]
        for fd in free:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[count], before[1]))

    yield leave
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("left, text", [(0, "cannot be taken: too many files"), (1, "cannot be mapped: "), (2, "")])
def test_where_too_many_files_are_open_that_is_said(pair, no_descriptors_left, lasting, left, text):
    """The first descriptor is taken, torch opens it again, and it is kept."""
    large = {"x": torch.ones(INLINE_LIMIT)}
    pair.client.send(SENTINEL, large, lasting=lasting)
    pair.client.send(SENTINEL)
    no_descriptors_left(left)
    if text:
        with pytest.raises(ProtocolError, match=f"{text}.*raise `ulimit -n` before ComfyUI starts"):
            pair.worker.receive()
    else:
        assert torch.equal(pair.worker.receive()[1]["x"], large["x"])
    assert pair.worker.receive() == (SENTINEL, {})


def test_small_tensors_are_aligned_alike_each_time(pair):
    """Or products over equal ones might not be equal to the bit."""
    for count in range(1, 40):
        pair.client.send(TO_WORKER[1], {f"t{i}": randn(count, i + 1, seed=i) for i in range(3)})
        _, arrived = pair.worker.receive()
        assert all(t.data_ptr() % 64 == 0 for t in arrived.values())


def test_the_largest_length_breaks_the_stream(pair):
    """As a negative one it would be a frame of nothing, and what follows be taken for frames."""
    pair.bare.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(OSError, match="a frame of 4294967295 bytes is too large"):
        pair.worker.receive()
