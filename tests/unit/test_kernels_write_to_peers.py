"""The order of small messages, which kernels write into other ranks' memory: played by threads on the CPU, in which
stand-ins for these kernels write there, part by part and with pauses."""

import ctypes
import itertools
import random
import threading
import time

import pytest
import torch
from test_peers import BATCH, DIM, HEADS, IMAGE, TEXT, ThreadArena, agree_by_arenas, agree_with_one
from test_peers_and_ring import ThreadExchange, places_of

from fastusp_backend.attention import usp
from fastusp_backend.comm import peers, transport
from fastusp_backend.comm.shards import SequenceShards
from fastusp_backend.config import Layout
from fastusp_backend.kernels.place import place, place_reference

pytestmark = pytest.mark.unit


class WritableArena(ThreadArena):
    """Kernels may write to peers, as in symmetric memory."""

    def addresses(self, shape, dtype, offset):
        return torch.tensor([self.view(p, shape, dtype, offset).data_ptr() for p in range(self.size)])


def at(address: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that begins at an address, of whichever rank."""
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = (ctypes.c_uint8 * size).from_address(int(address))
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


class Kernels:
    """Stand-ins for `place` and `scatter`. placed, scattered: how often they wrote to peers."""

    def __init__(self):
        self.placed = self.scattered = 0
        self._lock = threading.Lock()

    def _dawdle(self) -> None:
        time.sleep(random.random() * 1e-3)

    def place(self, projected, scales, rope, which, first, received, outgoing, position, regions, eps, there) -> None:
        given = projected, scales, rope, which, first
        if there is None:
            place(*given, received, outgoing, position, regions, eps)
            return
        assert int(there[position]) == received.data_ptr()
        leaving, rows = torch.empty_like(outgoing), slice(first, first + projected.shape[1])
        place_reference(*given, received, leaving, position, regions, eps)
        for to in random.sample(range(len(there)), len(there)):
            for mine, region in regions:
                start, stop = max(rows.start, mine.start), min(rows.stop, mine.stop)
                if to == position or start >= stop:
                    continue
                self._dawdle()
                target = slice(region.start + start - mine.start, region.start + stop - mine.start)
                theirs = at(there[to], received.shape, received.dtype)
                theirs[which, :, target] = leaving[which, to, :, start:stop]
        with self._lock:
            self.placed += 1

    def scatter(self, attended, there, position, text, image, rows) -> None:
        batch, _, *row = attended.shape
        owned = attended[:, : len(there) * text].unflatten(1, (len(there), text))
        owned = torch.cat([owned, attended[:, len(there) * text :].unflatten(1, (len(there), image))], 2)
        for to in random.sample(range(len(there)), len(there)):
            self._dawdle()
            theirs = at(there[to], (batch, text + image, len(there), *row), attended.dtype)
            theirs[:, rows, position] = owned[:, to, rows]
        with self._lock:
            self.scattered += 1


@pytest.fixture
def kernels(monkeypatch):
    kernels = Kernels()
    monkeypatch.setattr(usp, "place", kernels.place)
    monkeypatch.setattr(peers, "scatter", kernels.scatter)
    return kernels


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("limit", ["all", "less than three tensors"])
@pytest.mark.parametrize("ulysses, ring", [(2, 1), (4, 1), (2, 2)])
def test_ranks_agree_with_one(kernels, ulysses, ring, limit, overlap, monkeypatch):
    """Where some messages are too large, in turns with those that copy engines bring."""
    layout = Layout(ulysses=ulysses, ring=ring)
    shards = SequenceShards(layout, TEXT, IMAGE)
    tensor = BATCH * shards.local * HEADS // ulysses * DIM * 4
    monkeypatch.setattr(peers, "_WRITTEN", 3 * tensor - (limit != "all"))
    copied = itertools.count()
    copy = peers.copy
    monkeypatch.setattr(peers, "copy", lambda *given: (next(copied), copy(*given)))
    agree_by_arenas(layout, WritableArena, packed=None, overlap=overlap, bound=1e-6)
    # Three double blocks and two single ones, twice: of a double block the image's q, k and v one by one and the text's
    # together, then the image's once more; of a single one all together, which may be too large.
    whole = 2 * 2 * (limit == "all")
    assert kernels.placed == layout.ranks * (2 * 3 * (3 + 1 + 3) + whole)
    assert kernels.scattered == layout.ranks * 2 * (3 * 3 + 2)
    assert (next(copied) == 0) is (limit == "all")


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("ulysses, ring", [(2, 2), (2, 3)])
def test_ranks_agree_with_one_where_the_ring_goes_by_a_groups_collectives(kernels, ulysses, ring, overlap, monkeypatch):
    monkeypatch.setattr(transport, "allocate_together", lambda allocate, group: allocate())
    monkeypatch.setattr(transport, "GroupExchange", ThreadExchange)
    monkeypatch.setitem(
        transport._ARENAS, "symmetric memory", lambda group, device: WritableArena(group.ground, group.position)
    )
    agree_with_one(places_of(Layout(ulysses=ulysses, ring=ring)), packed=None, overlap=overlap, bound=1e-6)
    assert kernels.placed == ulysses * ring * 2 * (3 * (3 + 1 + 3) + 2)
    assert kernels.scattered == ulysses * ring * 2 * (3 * 3 + 2)
