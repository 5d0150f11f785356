"""The order of messages between ranks that reach each other's memory, played by threads on the CPU: joint attention of
several layers equals one rank's for every layout, and no rank overtakes the readers of a buffer."""

import contextlib
import random
import threading
import time
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from support import relative_difference

from fastusp_backend.attention import ALL, ONLY_K, ONLY_Q, ONLY_V, JointAttention
from fastusp_backend.attention.local import math
from fastusp_backend.comm import messages, peers
from fastusp_backend.comm.mesh import Mesh, single_rank_mesh
from fastusp_backend.comm.shards import SequenceShards
from fastusp_backend.comm.transport import Transport
from fastusp_backend.config import Layout

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
HEADS, DIM, BATCH = 4, 16, 2
TEXT, IMAGE = 5, 22


class Ground:
    """What the arenas of all ranks stand on."""

    def __init__(self, size: int):
        self.size = size
        self.memory = [torch.zeros(0, dtype=torch.uint8)] * size
        self.raised: set[tuple[int, int, int]] = set()
        self.changed = threading.Condition()


class ThreadArena:
    """An arena of threads. It dawdles, so that what is not ordered by signals happens in any order."""

    hops = 1

    def __init__(self, ground: Ground, position: int):
        self.ground, self.position, self.size, self.generation = ground, position, ground.size, 0
        self._expected = []
        self._dawdle = random.Random(position)

    def reserve(self, capacity):
        self.ground.memory[self.position] = torch.full((capacity,), 0x7F, dtype=torch.uint8)

    def view(self, position, shape, dtype, offset):
        time.sleep(self._dawdle.random() * 1e-3)
        end = time.monotonic() + 20
        while self.ground.memory[position].numel() == 0:
            assert time.monotonic() < end, f"rank {position} has no memory"
            time.sleep(1e-3)
        size = torch.Size(shape).numel() * dtype.itemsize
        return self.ground.memory[position][offset : offset + size].view(dtype).view(shape)

    def own(self, shape, dtype, offset):
        return self.view(self.position, shape, dtype, offset)

    def addresses(self, shape, dtype, offset):
        return None  # no kernel writes there

    def side_stream(self):
        time.sleep(self._dawdle.random() * 2e-3)
        return contextlib.nullcontext()

    reading_stream = side_stream

    def put_signals(self, peers, channel):
        for signal in [(peer, self.position, channel) for peer in peers]:
            time.sleep(self._dawdle.random() * 1e-3)
            with self.ground.changed:
                assert signal not in self.ground.raised, f"{signal} was not heard"
                self.ground.raised.add(signal)
                self.ground.changed.notify_all()

    def wait_signals(self, peers, channel):
        for signal in [(self.position, peer, channel) for peer in peers]:
            with self.ground.changed:
                came = self.ground.changed.wait_for(lambda signal=signal: signal in self.ground.raised, timeout=20)
                assert came, f"{signal} hangs"
                self.ground.raised.discard(signal)

    def publish(self, part):
        pass

    def expect(self, peer, channel, parts):
        self._expected.append((peer, channel, parts))

    def checkpoint(self):
        expected, self._expected = self._expected, []
        return lambda: self._await(expected)

    def wait_all(self):
        self._await(self._expected)
        self._expected = []

    def _await(self, expected):
        for peer, channel, parts in expected:
            self.wait_signals([peer], channel)
            self.fetch(parts)

    def fetch(self, parts):
        pass


class MirroredArena(ThreadArena):
    """Peers reach a mirror of a rank's memory alone: what they write must be fetched, what they read published."""

    hops = 2

    def reserve(self, capacity):
        self.device = torch.full((capacity,), 0x7F, dtype=torch.uint8)
        super().reserve(capacity)

    def own(self, shape, dtype, offset):
        size = torch.Size(shape).numel() * dtype.itemsize
        return self.device[offset : offset + size].view(dtype).view(shape)

    def publish(self, part):
        time.sleep(self._dawdle.random() * 1e-3)
        part.of(self.position).copy_(part.own)

    def fetch(self, parts):
        for part in parts:
            part.own.copy_(part.of(self.position))


def layers(joint: JointAttention, x, scales, rope, local_text: int, count: int) -> torch.Tensor:
    """Double and single blocks' calls in turn, each on the result of the one before; of a double block the image's
    tokens attend to each other once more."""
    text_rope, image_rope = (tuple(r[rows] for r in rope) for rows in (slice(local_text), slice(local_text, None)))
    c = HEADS * DIM
    for layer in range(count):
        text, image = x[:, :local_text], x[:, local_text:]
        if layer % 2:
            for which in joint.parts:
                joint.project(x[..., which.start * c : which.stop * c], scales[which], rope, which)
            joint.attend()
            attended = joint.collect()
        else:
            for which in (ONLY_V, ONLY_K, ONLY_Q):
                part = image[..., which.start * c : which.stop * c]
                joint.project(part, scales[which], image_rope, which, text=False)
            joint.project(text, scales, text_rope, ALL, image=False)
            joint.attend(text_first=True)
            from_text, from_image = joint.collect_text() * 2, joint.collect_image()
            for which in (ONLY_V, ONLY_K):
                part = image[..., which.start * c : which.stop * c]
                joint.project(part, scales[which], None, which, text=False)
            from_image = from_image.clone()  # what others give back next comes to where this lies
            joint.project(2 * image[..., :c], scales[ONLY_Q], None, ONLY_Q, text=False)
            joint.attend(image_only=True)
            attended = torch.cat([from_text, from_image + joint.collect_image()], 1)
        x = x + attended.repeat(1, 1, 3)
    return x


def run_rank(mesh, transport, given, *, packed, overlap, results):
    rank, shards = mesh.sequence_position, SequenceShards(mesh.layout, TEXT, IMAGE)
    links = transport.connect(shards, len(given[0]), HEADS, DIM, torch.float32, packed=packed, width=3)
    joint = JointAttention(mesh, math, shards, links, overlap=overlap, pipelined=overlap)

    def local(x, dim):
        text, image = x.split([TEXT, IMAGE], dim)
        return torch.cat([shards.take_text(text, rank, dim=dim), shards.take_image(image, rank, dim=dim)], dim)

    x, scales, rope = given
    for _ in range(2):
        out = layers(joint, local(x, 1), scales, tuple(local(r, 0) for r in rope), shards.local_text, 5)
        image = out[:, shards.local_text :, :3].contiguous()
        whole = shards.join_image(links.gather.all_gather(image)()).clone()
        results.append(SimpleNamespace(rank=rank, image=whole))


def agree_with_one(
    places: list[tuple[Mesh, Transport]],
    *,
    packed: torch.dtype | None,
    overlap: bool,
    bound: float,
    batch: int = BATCH,
):
    """Runs the ranks at `places`, each in a thread, and one rank alone, and compares."""
    layout = places[0][0].layout
    generator = torch.Generator().manual_seed(layout.ulysses * 10 + layout.ring)
    x = torch.randn(batch, TEXT + IMAGE, 3 * HEADS * DIM, generator=generator)
    angles = torch.rand(TEXT + IMAGE, DIM // 2, generator=generator)
    scales = torch.rand(DIM, generator=generator), torch.rand(DIM, generator=generator), None
    given = x, scales, (angles.cos(), angles.sin())

    alone = single_rank_mesh(CPU)
    shards = SequenceShards(alone.layout, TEXT, IMAGE)
    links = Transport(alone).connect(shards, batch, HEADS, DIM, torch.float32, packed=None, width=3)
    joint = JointAttention(alone, math, shards, links, overlap=True, pipelined=True)
    expected = layers(joint, x, scales, given[2], TEXT, 5)[:, TEXT:, :3]

    results = []
    how = {"packed": packed, "overlap": overlap, "results": results}
    threads = [threading.Thread(target=run_rank, args=(*place, given), kwargs=how, daemon=True) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2 * layout.ranks
    for result in results:
        assert relative_difference(result.image, expected) < bound, f"rank {result.rank}"


EXACT, EIGHT_BITS = (None, 1e-6), ((torch.uint8, 0.1), (torch.int8, 0.03))
ORDERS = product(enumerate((ThreadArena, MirroredArena)), enumerate([(2, 1), (1, 2), (4, 1), (2, 2), (1, 3)]), (0, 1))


def agree_by_arenas(layout: Layout, arena: type[ThreadArena], **how) -> None:
    """As `agree_with_one`, of ranks whose messages go through arenas of this kind."""
    grounds = [Ground(layout.ranks), Ground(layout.ranks)]
    groups = {"sequence": object(), "ring": object() if layout.ring > 1 else None}
    places = []
    for rank in range(layout.ranks):
        mesh = Mesh(layout=layout, device=CPU, sequence_position=rank, **groups)
        places.append((mesh, Transport(mesh, "gloo")))
        places[-1][1]._arenas = [arena(ground, rank) for ground in grounds]
    agree_with_one(places, **how)
    assert not grounds[0].raised and not grounds[1].raised, "a signal was never heard"


@pytest.mark.parametrize(
    "arena, ulysses, ring, overlap, packed, bound",
    [
        pytest.param(
            arena, *layout, bool(overlap), *wire, marks=pytest.mark.thorough if (a + b + overlap + n) % 2 else ()
        )
        for (a, arena), (b, layout), overlap in ORDERS
        for n, wire in enumerate((EXACT, EIGHT_BITS[b % 2]))
    ],
)
def test_ranks_agree_with_one(ulysses, ring, packed, bound, overlap, arena, monkeypatch):
    """Packed in one of the types of 8 bits each: messages take the same order with either. Where they take two hops,
    in pieces or whole."""
    for bound_of in ("PIECE", "TURN"):
        monkeypatch.setattr(messages, bound_of, 0 if overlap else 1 << 30)
    unpacked, unpack = [], peers.unpack_gathered
    monkeypatch.setattr(
        peers, "unpack_gathered", lambda p, *args, **kw: (unpacked.append(len(p)), unpack(p, *args, **kw))
    )
    layout = Layout(ulysses=ulysses, ring=ring)
    agree_by_arenas(layout, arena, packed=packed, overlap=overlap, bound=bound)
    # Three double blocks and two single ones, twice: q, k, v once, or the image's one by one and all with the text; and
    # of the image's own attention.
    tensors = 3 * (3 if overlap else 6) + 3 * 3 + 2 * 3
    assert sum(unpacked) == (2 * layout.ranks * tensors if packed and ulysses > 1 else 0)
