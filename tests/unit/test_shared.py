"""Tensors as bytes, in shared memory, behind a message and between ranks: every type comes back as it was, whatever
its neighbours' widths."""

import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import msgspec
import pytest
import torch
from channels import INLINE, SENTINEL, SHARED, frame, memory

from fastusp_backend.errors import ProtocolError, RequestError
from fastusp_backend.protocol import Done, SharedTensors
from fastusp_backend.protocol.channel import INLINE_LIMIT
from fastusp_backend.protocol.shared import TYPES
from fastusp_backend.worker import crew

pytestmark = pytest.mark.unit

HERE = [name for name in TYPES if hasattr(torch, name)]
NONE_OF_THEM = {"uint1", "uint2", "uint3", "uint4", "uint5", "uint6", "uint7", "quint8", "qint8", "qint32", "quint4x2"}
NONE_OF_THEM |= {"int1", "int2", "int3", "int4", "int5", "int6", "int7", "quint2x4", "bits8", "bits16", "bits1x8"}
NONE_OF_THEM |= {"bits2x4", "bits4x2", "float4_e2m1fn_x2", "complex32"}


def of_type(name: str, count: int) -> torch.Tensor:
    """Bytes of all values, as `count` elements of a type."""
    dtype = getattr(torch, name)
    values = 2 if name == "bool" else 256
    return (torch.arange(count * dtype.itemsize) * 37 % values).to(torch.uint8).view(dtype)


def tensors(count: int = 5) -> dict[str, torch.Tensor]:
    given = {name: of_type(name, count) for name in HERE}
    given |= {f"{name}, a scalar": of_type(name, 1).view(()) for name in HERE}
    given |= {f"{name}, empty": of_type(name, 0).view(0, 4) for name in HERE}
    given |= {f"{name}, transposed": of_type(name, 21).view(3, 7).T for name in HERE}
    given |= {f"{name}, expanded": of_type(name, 3).view(1, 3).expand(4, 3) for name in HERE}
    return given | {"conjugate": torch.complex(torch.ones(3), torch.ones(3)).conj(), "": torch.ones(1)}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.resolve_conj().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(got, wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(got[name]) == bits(tensor), name


def test_every_type_of_torch_travels_or_is_refused():
    types = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert types == {*HERE} | NONE_OF_THEM & types
    assert not {*TYPES} & NONE_OF_THEM


@pytest.mark.parametrize("name", HERE)
def test_what_travels_is_compared_here_and_converted_there(name):
    ones = torch.ones(4).to(getattr(torch, name))
    assert torch.equal(ones, ones.clone()) and torch.equal(ones.to(torch.bfloat16), torch.ones(4).bfloat16())


@pytest.mark.parametrize("count", [5, INLINE_LIMIT // 8], ids=["inline", "shared"])
@pytest.mark.parametrize("back", [False, True], ids=["to the workers", "back"])
def test_every_type_and_shape(pair, count, back):
    ends, message = (pair.client, pair.worker), SENTINEL
    if back:
        ends, message = ends[::-1], Done(id=1)
    wanted = tensors(count)
    ends[0].send(message, wanted)
    _, got = ends[1].receive()
    assert isinstance(got, SharedTensors) is (count > 5)
    assert_same(got, wanted)


def test_every_type_and_shape_between_machines(pair):
    """In one frame, however large, where no memory is shared."""
    pair.client.shares_memory, wanted = False, tensors(INLINE_LIMIT // 8)
    with ThreadPoolExecutor(1) as thread:
        sent = thread.submit(pair.client.send, SENTINEL, wanted)
        _, got = pair.worker.receive()
        sent.result()
    assert type(got) is dict
    assert_same(got, wanted)


@pytest.mark.parametrize("wanted", [tensors(), {"empty": torch.empty(0, 4)}, {}], ids=["all", "empty", "none"])
def test_every_type_and_shape_between_ranks(monkeypatch, wanted):
    said = []

    def ranks(number: int) -> crew.Crew:
        def broadcast(tensor, source, group):
            assert source == 0
            if number:
                tensor.copy_(said.pop(0))
            else:
                said.append(tensor.clone())

        dist = {"get_rank": lambda: number, "get_world_size": lambda: 2, "new_group": lambda **_: None}
        monkeypatch.setattr(crew, "dist", SimpleNamespace(**dist, broadcast=broadcast))
        monkeypatch.setattr(crew, "close_ports", lambda: None)
        return crew.Crew(pins=False, one_machine=False)

    assert ranks(0).broadcast_tensors(wanted) is wanted
    assert_same(ranks(1).broadcast_tensors(None), wanted)
    assert not said


@pytest.mark.parametrize(
    "tensor, what",
    [(torch.empty(2, dtype=torch.uint4), "uint4"), (torch.eye(2).to_sparse(), "sparse_coo")],
)
def test_what_does_not_travel_is_named(pair, tensor, what):
    """Nothing is sent of it."""
    words = f"^Convert tensor 'z' to dense float32 before it reaches the sampler: it is torch.{what}, which does not"
    with pytest.raises(RequestError, match=words):
        pair.client.send(SENTINEL, {"x": torch.ones(2), "z": tensor})
    assert not pair.waits()


@pytest.mark.parametrize("carrier", [INLINE, SHARED])
def test_a_type_that_this_torch_lacks_is_refused_in_place(pair, monkeypatch, carrier):
    monkeypatch.delattr(torch, "float8_e8m0fnu")
    places = msgspec.msgpack.encode({"x": ["float8_e8m0fnu", [2], 0]})
    if carrier == INLINE:
        pair.send_bytes(frame(SENTINEL, carrier=carrier, places=places, blob=bytes(2)))
    else:
        fd = memory(bytes(2), sealed=True)
        pair.send_with(fd, frame(SENTINEL, carrier=carrier, places=places))
        os.close(fd)
    pair.client.send(SENTINEL)
    with pytest.raises(ProtocolError, match="^Install the same torch at both ends: torch .* has no type float8_e8m0"):
        pair.worker.receive()
    assert pair.worker.receive() == (SENTINEL, {})
