"""One rank of many as benchmarks/played.py plays it: what it sends comes in the order and to the places in which its
peers' messages really come."""

from pathlib import Path

import pytest
import torch
from test_in_flight import Arena

from fastusp_backend.comm.arena import Part, carve
from fastusp_backend.comm.peers import PeerUlysses
from fastusp_backend.comm.shards import SequenceShards
from fastusp_backend.comm.wire import Wire
from fastusp_backend.config import Layout

pytestmark = pytest.mark.unit

BATCH, HEADS, DIM, TEXT, IMAGE = 2, 2, 16, 21, 50


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))


def test_a_played_peer_sends_what_a_real_one_would():
    """Of four in a Ulysses group rank 0 sends to 1, 2 and 3, and gets first what 3 sends to the next one first. Each
    one's signals come to one place, in its own Ulysses group or ring."""
    from played import seen_from_there

    assert [seen_from_there(Layout(ulysses=4, ring=1), peer) for peer in range(4)] == [0, 3, 2, 1]
    assert [seen_from_there(Layout(ulysses=1, ring=3), peer) for peer in range(3)] == [0, 2, 1]
    layout = Layout(ulysses=4, ring=3)
    there = [seen_from_there(layout, peer) for peer in range(12)]
    assert sorted(there) == list(range(12)) and [there[peer] for peer in there] == list(range(12))
    assert there[:4] == [0, 3, 2, 1] and there[::4] == [0, 8, 4]


def first_rank(layout: Layout, packed: torch.dtype | None) -> PeerUlysses:
    shards, wire = SequenceShards(layout, TEXT, IMAGE), Wire(HEADS, DIM, torch.float32, packed)
    u, local = layout.ulysses, shards.local
    gathered, returned = (3, BATCH, shards.gathered, HEADS, DIM), (BATCH, local, u, *wire.row)
    if packed:
        gathered, returned = (3, u, BATCH, local, *wire.row), (u, BATCH, local, *wire.row)
    regions = carve(Arena(layout.ranks, [], hops=2), [(shape, wire.carrier) for shape in (gathered, returned)])
    return PeerUlysses([*range(u)], shards, wire, *regions, BATCH)


def places(ulysses: PeerUlysses, source: int) -> list[Part]:
    """Where a rank of the group puts all that it sends."""
    which, rows = slice(0, 3), [local for local, _ in ulysses._shards.regions(source)]
    arriving = [part for part, _ in ulysses._arrival(source, which, text=True, image=True)]
    return arriving + [ulysses._place_of(source, b, part) for part in rows for b in range(BATCH)]


@pytest.mark.parametrize("packed", [None, torch.int8])
@pytest.mark.parametrize("layout", [Layout(ulysses=2, ring=1), Layout(ulysses=4, ring=1), Layout(ulysses=2, ring=3)])
def test_what_is_sent_lies_where_it_is_fetched(layout, packed):
    """All of what a rank fetches from its peers is written, and of those peers' parts each once."""
    from played import WhereItIsFetched, seen_from_there

    ulysses = first_rank(layout, packed)
    for peer in range(1, layout.ulysses):
        source, written = seen_from_there(layout, peer), 0
        assert 0 < source < layout.ulysses
        for own, expected in zip(places(ulysses, 0), places(ulysses, source), strict=True):
            there = WhereItIsFetched(own.region.own, layout, peer, TEXT)
            assert there[own.index].data_ptr() == expected.own.data_ptr()
            assert there[own.index].shape == expected.own.shape
            written += there[own.index].numel()
        assert written == sum(part.own.numel() for part in places(ulysses, 0))


def test_the_gather_and_a_ring_s_block():
    from played import WhereItIsFetched

    layout = Layout(ulysses=2, ring=2)
    memory = torch.arange(3 * 2 * 8).view(3, 2, 8)
    assert [int(WhereItIsFetched(torch.arange(4), layout, peer, TEXT)[(0,)]) for peer in range(1, 4)] == [1, 2, 3]
    for index in ((), (slice(1, 3),), (slice(1, 2), slice(None), slice(0, 4)), (slice(1, 2), slice(0, 1))):
        assert torch.equal(WhereItIsFetched(memory, layout, 1, TEXT)[index], memory[index])
