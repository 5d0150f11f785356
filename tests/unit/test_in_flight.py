"""What travels beside the computation: when it is awaited, and that it lives until it has arrived."""

import contextlib
import gc
import weakref

import pytest
import torch
from support import randn

from fastusp_backend.comm import messages
from fastusp_backend.comm.arena import Part, carve
from fastusp_backend.comm.collective import CollectiveRing
from fastusp_backend.comm.peer_gather import PeerGather
from fastusp_backend.comm.peer_ring import PeerRing
from fastusp_backend.comm.peers import PeerUlysses
from fastusp_backend.comm.shards import SequenceShards
from fastusp_backend.comm.wire import Wire
from fastusp_backend.config import Layout

pytestmark = pytest.mark.unit

HEADS, DIM, BATCH = 2, 8, 1


class Arena:
    """Rank 0's, of `size` ranks that lie in its own memory. Notes in `calls` what is pulled and awaited."""

    position = generation = 0

    def __init__(self, size: int, calls: list[str], hops: int = 1):
        self.size, self.calls, self.hops, self.signalled, self.expected = size, calls, hops, [], []

    def reserve(self, capacity):
        self.memory = torch.zeros(capacity, dtype=torch.uint8)

    def view(self, position, shape, dtype, offset):
        return self.own(shape, dtype, offset)

    def own(self, shape, dtype, offset):
        size = torch.Size(shape).numel() * dtype.itemsize
        return self.memory[offset : offset + size].view(dtype).view(shape)

    def addresses(self, shape, dtype, offset):
        return None  # no kernel writes there

    def side_stream(self):
        return contextlib.nullcontext()

    reading_stream = side_stream

    def wait_signals(self, peers_, channel):
        if channel == messages.READY:
            self.calls.append("start")

    def wait_all(self):
        self.calls.append("await")

    def put_signals(self, peers_, channel):
        self.signalled += [list(peers_)]

    def publish(self, part):
        pass

    def expect(self, peer, channel, parts):
        self.expected += [peer]


class Group:
    """Rank 0 of three that pass blocks on."""

    position, size = 0, 3

    def __init__(self, calls: list[str]):
        self.calls = calls

    def shift(self, block):
        self.calls.append("start")

        def wait():
            self.calls.append("await")
            return block.clone()

        return wait


@pytest.mark.parametrize("packed", [None, torch.int8])
@pytest.mark.parametrize("kind", ["collective", "peers"])
@pytest.mark.parametrize("pipelined", [True, False])
def test_the_rings_next_block_travels_while_one_is_attended_if_that_is_wanted(kind, pipelined, packed):
    calls, wire, shape = [], Wire(HEADS, DIM, torch.float32, packed), (2, BATCH, 5)
    if kind == "peers":
        (block,) = carve(Arena(3, calls), [((*shape, *wire.row), wire.carrier)])
        ring = PeerRing([0, 1, 2], wire, Part(block))
        own = block.own if packed is None else torch.empty(*shape, HEADS, DIM)
    else:
        ring, own = CollectiveRing(Group(calls), wire), torch.empty(*shape, HEADS, DIM)
    own.copy_(randn(*own.shape, seed=0))
    late, early = ["start", "attend", "await"], ["start", "await", "attend"]
    if kind == "peers" and not pipelined:
        early.append("await")  # once more, for nothing
    for before in (["start"], []):  # a layer that has started before it attends, and one that has not
        calls.clear()
        for _ in before:
            ring.start(own)
            calls.append("compute")
        order = []
        for position, _ in ring.rotate(own, pipelined=pipelined):
            order.append(position)
            calls.append("attend")
        assert order == [0, 2, 1]
        expected = 2 * (late if pipelined else early) + ["attend"]
        assert calls == [*before, "compute", *expected[1:]] if before else calls == expected


@pytest.mark.parametrize("packed", [None, torch.uint8, torch.int8])
def test_attended_rows_live_until_their_readers_are_done(monkeypatch, packed):
    shards, wire = SequenceShards(Layout(ulysses=2, ring=1), 3, 5), Wire(HEADS, DIM, torch.float32, packed)
    gathered = (3, 2, BATCH, shards.local, *wire.row) if packed else (3, BATCH, shards.gathered, HEADS, DIM)
    returned = (2, BATCH, shards.local, *wire.row) if packed else (BATCH, shards.local, 2, HEADS, DIM)
    regions = carve(Arena(2, []), [(shape, wire.carrier) for shape in (gathered, returned)])
    ulysses = PeerUlysses([0, 1], shards, wire, *regions, BATCH)
    encode, alive = Wire.encode, []

    def watched(self, x):
        rows = encode(self, x)
        alive.extend(weakref.ref(t.untyped_storage()) for t in (x, rows))
        return rows

    monkeypatch.setattr(Wire, "encode", watched)
    ulysses.give_back(randn(BATCH, shards.gathered, HEADS, DIM, seed=0))
    gc.collect()
    assert all(kept() is not None for kept in alive) and len(alive) == 2
    ulysses.take_back()
    gc.collect()
    assert all(kept() is None for kept in alive)


@pytest.mark.parametrize(
    "ranks, hops, packed, image, in_turn, own_last",
    [
        (2, 2, None, 2000, True, True),
        (2, 1, None, 2000, False, False),  # nothing to hide for
        (2, 2, torch.int8, 4000, True, True),
        (4, 2, None, 8000, True, False),
        (4, 2, torch.int8, 600, True, False),
        (2, 2, None, 20, False, False),
    ],
)
def test_when_a_rank_attends_its_own_image_last(ranks, hops, packed, image, in_turn, own_last):
    shards = SequenceShards(Layout(ulysses=ranks, ring=1), 8, ranks * image)
    wire = Wire(16, 64, torch.bfloat16, packed)
    gathered = (3, ranks, BATCH, shards.local, *wire.row) if packed else (3, BATCH, shards.gathered, 16, 64)
    regions = carve(Arena(ranks, [], hops), [(gathered, wire.carrier), ((1,), wire.carrier)])
    ulysses = PeerUlysses(list(range(ranks)), shards, wire, *regions, BATCH)
    assert (ulysses.in_turn, ulysses.own_last) == (in_turn, own_last)


@pytest.mark.parametrize(
    "hops, images, tokens, pieces",
    [
        (1, 1, 1 << 12, [(2, 1, 1 << 12)]),
        (2, 1, 1 << 6, [(2, 1, 1 << 6)]),
        (2, 1, 1 << 10, [(1, 1, 1 << 10)] * 2),
        (2, 1, (1 << 11) + 1, [(1, 1, (1 << 10) + 1), (1, 1, 1 << 10)] * 2),
        (2, 3, 1 << 11, [(1, 2, 1 << 11), (1, 1, 1 << 11)] * 2),
    ],
)
def test_the_pieces_of_a_rings_block(hops, images, tokens, pieces):
    """Each lies in one, so that a copy engine takes it, and all of them are the block."""
    wire, arena = Wire(1, 1 << 8, torch.float32, None), Arena(2, [], hops)
    (region,) = carve(arena, [((3, images, tokens, 1, 1 << 8), torch.float32)])
    arena.signalled.clear()
    ring, published = PeerRing([0, 1], wire, Part(region, (slice(1, 3),))), []
    arena.publish = lambda part: published.append(part.own)
    ring.start(region.own[1:])
    assert [part.shape[:3] for part in published] == pieces
    assert all(part.is_contiguous() for part in published)
    for part in published:
        part += 1
    assert (region.own[1:] == 1).all() and (region.own[0] == 0).all()


@pytest.mark.parametrize("hops, signalled", [(1, [[1, 2, 3]]), (2, [[1], [2], [3]])])
def test_a_part_that_has_another_way_to_go_is_signalled_at_once(hops, signalled):
    """Rank 0 sends to rank 1 first, and rank 3 to rank 0: theirs arrives first."""
    shards, wire = SequenceShards(Layout(ulysses=4, ring=1), 8, 16), Wire(HEADS, DIM, torch.float32, torch.int8)
    shapes = (3, 4, BATCH, shards.local, *wire.row), (4, BATCH, shards.local, *wire.row)
    arena = Arena(4, [], hops)
    ulysses = PeerUlysses([0, 1, 2, 3], shards, wire, *carve(arena, [(s, wire.carrier) for s in shapes]), BATCH)
    for start in (
        lambda: ulysses.send(slice(0, 3)),
        lambda: ulysses.give_back(randn(BATCH, shards.gathered, HEADS, DIM, seed=0)),
    ):
        arena.signalled.clear()
        arena.expected.clear()
        start()
        assert arena.signalled == signalled and arena.expected == [3, 2, 1]


def test_what_is_gathered_lives_until_all_have_it():
    gather, given = PeerGather(Arena(2, []), (3, 4), torch.float32), randn(4, 3, seed=0)
    wait = gather.all_gather(given.T.contiguous())
    cells = [cell.cell_contents for cell in wait.__closure__]
    assert any(isinstance(kept, torch.Tensor) and torch.equal(kept, given.T) for kept in cells)
    assert torch.equal(wait()[0], given.T)
