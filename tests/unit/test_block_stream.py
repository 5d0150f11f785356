"""The order in which blocks come to their slots: whether a copy is made at once or as late as it may be, every block
computes with its own weights."""

import unittest.mock
from dataclasses import replace

import pytest
import torch
from support import SMALL

from fastusp_backend.comm import block_store
from fastusp_backend.comm.block_store import HostStore
from fastusp_backend.config import FileState, ModelSpec
from fastusp_backend.engine import block_stream
from fastusp_backend.engine.block_stream import BlockStream
from fastusp_backend.models.files import storage_plans
from fastusp_backend.models.ownership import Ownership
from fastusp_backend.models.placement import stream_count
from fastusp_backend.weights.stored import Stored
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]
CPU = torch.device("cpu")
WAYS = {
    "at once": {"source": "host", "beside_tokens": False},
    "halves": {"source": "shared", "beside_tokens": True},
    "shares": {"source": "host", "beside_tokens": True},
}
"""In which the next block is fetched, whatever memory it comes from."""


class Late(BlockStream):
    """Copies when it is waited for, and not before."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._begun = []

    def _fetch(self, size=None):
        waiting = list(self._waiting)
        with unittest.mock.patch.object(block_stream, "_copy", self._begun.extend):
            super()._fetch(size)
        assert self._begun or not waiting

    def _join(self):
        super()._join()
        for target, source in self._begun:
            target.copy_(source)
        self._begun.clear()


def streaming(count, kind=BlockStream, way="at once"):
    """A stream over `count` of the 4 blocks; each weight is filled with its block's number."""
    with torch.device("meta"):
        model = SMALL.build()
    header = {model.file_key(name): TensorInfo(tuple(p.shape), torch.float32) for name, p in model.named_parameters()}
    spec = ModelSpec(path="", file=FileState(0, 0, 0, 0), storage=None, compute="float32")
    plans = storage_plans(model, header, spec)
    placement = stream_count(model, plans, Ownership(model, plans, 1), "host", count)
    store = HostStore([slab.parts for slab in placement.slabs], [slab.slot for slab in placement.slabs], CPU)
    stream = kind(model, replace(placement, **WAYS[way]), plans, store, CPU)
    stream.allocate()
    stream.share()
    for slab in placement.slabs:
        for name in slab.offsets:
            stream.load(name, Stored(torch.full(plans[name].shape, float(slab.block))))
    stream.meet()
    return model, stream


def values(model, slab):
    weights = [model.get_submodule(name.rpartition(".")[0]).weight for name in slab.offsets]
    return {value.item() for weight in weights for value in weight.aminmax()}


@pytest.mark.parametrize(
    "count, kind, way",
    [
        pytest.param(count, kind, way, marks=pytest.mark.thorough if (count + late + n) % 2 else ())
        for late, kind in enumerate((BlockStream, Late))
        for n, way in enumerate(WAYS)
        for count in (1, 2, 3, 4)
    ],
)
def test_every_block_finds_its_weights(count, kind, way):
    model, stream = streaming(count, kind, way)
    slabs = {slab.block: slab for slab in stream.placement.slabs}
    for _ in range(3):
        stream.prime(tokens=True)
        for block in range(4):
            stream.begin(block)
            if block in slabs:
                assert values(model, slabs[block]) == {float(block)}
            for say in (stream.tokens_arrived, stream.tokens_returned):
                say()
                if block in slabs:  # the next one may come now, but not over these
                    assert values(model, slabs[block]) == {float(block)}
        stream.end()


def test_a_changed_weight_is_what_comes():
    model, stream = streaming(4)
    stream.prime(tokens=True)
    name = next(iter(stream.placement.slabs[2].offsets))
    with stream.changing():
        stream.open(name)
        model.get_submodule(name.rpartition(".")[0]).weight.add_(0.5)
    stream.prime(tokens=True)
    for block in range(4):
        stream.begin(block)
        expected = {float(block)} | ({2.5} if block == 2 else set())
        assert values(model, stream.placement.slabs[block]) == expected
    stream.end()


def test_a_change_that_fails_keeps_what_was_changed_before():
    """And no weight is changed in one rank's part alone."""
    model, stream = streaming(4)
    name = next(iter(stream.placement.slabs[1].offsets))
    layer = model.get_submodule(name.rpartition(".")[0])
    with pytest.raises(OSError, match="no file"), stream.changing():
        stream.open(name)
        layer.weight.add_(0.5)
        raise OSError("no file")
    stream.prime(tokens=True)
    for block in range(2):
        stream.begin(block)
    assert layer.weight.eq(1.5).all()


def test_addresses_stay():
    model, stream = streaming(4)
    before = [tensor.data_ptr() for tensor in stream.tensors]
    for _ in range(2):
        stream.prime(tokens=True)
        for block in range(4):
            stream.begin(block)
        stream.end()
        stream.meet()
    assert [tensor.data_ptr() for tensor in stream.tensors] == before


def test_half_of_a_large_block_waits_for_the_attended_tokens():
    """Those of queries, keys and values are not held up by any, those that return by half of the largest block's."""
    _, stream = streaming(4, way="halves")
    slabs = stream.placement.slabs
    largest = max(sum(slab.parts) for slab in slabs)
    for block, *left in waiting(stream):
        coming = sum(slabs[(block + 1) % 4].parts)
        assert left == [coming, max(0, coming - largest // 2), 0]


def waiting(stream, tokens=True):
    """Of each block the bytes of the next one that were not begun when it began, attended, and had its tokens back."""
    stream.prime(tokens)
    with unittest.mock.patch.object(block_store, "COPY", 1 << 16):
        for block in range(4):
            left = [block]
            for say in (lambda block=block: stream.begin(block), stream.tokens_arrived, stream.tokens_returned):
                say()
                left.append(block_stream._size(stream._waiting))
            yield left


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_equal_shares_from_the_host_between_tokens(count):
    """Until the next block that comes: of two of four blocks over two blocks each, of three over one, one and two."""
    _, stream = streaming(count, way="shares")
    slabs = stream.placement.slabs
    begins = [*(slab.block for slab in slabs), 4]
    for block, *left in waiting(stream):
        number = max(n for n, begin in enumerate(begins[:-1]) if begin <= block)
        coming = sum(slabs[(number + 1) % count].parts) if count > 1 else 0
        blocks = begins[number + 1] - begins[number]
        begun = 3 * (block - begins[number])
        expected = [coming * (1 - (begun + n) / (3 * blocks)) for n in (1, 2, 3)]
        assert left == pytest.approx(expected, abs=3 * blocks)


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_of_one_rank_exchanges_no_tokens_to_wait_for(way):
    _, stream = streaming(4, way=way)
    assert all(left == [0, 0, 0] for _, *left in waiting(stream, tokens=False))
