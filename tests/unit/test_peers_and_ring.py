"""Ulysses by memory that a machine's ranks share, the ring and the gather by collectives between machines, played by
threads on the CPU: joint attention equals one rank's, and no rank overwrites what a ring still sends."""

import random
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from test_peers import CPU, Ground, MirroredArena, ThreadArena, agree_with_one

from fastusp_backend.comm import transport
from fastusp_backend.comm.mesh import Mesh
from fastusp_backend.comm.transport import Transport
from fastusp_backend.config import Layout

pytestmark = pytest.mark.unit

KIND = "symmetric memory, nccl between machines"


class Post:
    """What the ranks of a group have sent, and who has read it."""

    def __init__(self, size: int):
        self.size = size
        self.sent: dict[tuple[int, int], torch.Tensor] = {}
        self.read: set[tuple[int, int, int]] = set()
        self.changed = threading.Condition()


class ThreadExchange:
    """A `GroupExchange` of threads, over a member of a `Post`. What is sent is read where it lies, and as late as may
    be: when its reader waits for it."""

    def __init__(self, member: SimpleNamespace):
        self.post, self.position, self.size = member.post, member.position, member.post.size
        self._messages = 0
        self._dawdle = random.Random(member.position)

    def shift(self, x):
        following, previous = (self.position + 1) % self.size, (self.position - 1) % self.size
        return self._started(x, [previous], [following], lambda read: read[0])

    def all_gather(self, x):
        everybody = list(range(self.size))
        return self._started(x, everybody, everybody, torch.stack)

    def _started(self, x, sources, readers, made):
        message, post = self._messages, self.post
        self._messages += 1
        assert x.is_contiguous()
        with post.changed:
            post.sent[self.position, message] = x
            post.changed.notify_all()

        def wait():
            read = []
            for source in sources:
                with post.changed:
                    assert post.changed.wait_for(lambda source=source: (source, message) in post.sent, timeout=20)
                time.sleep(self._dawdle.random() * 1e-2)
                read.append(post.sent[source, message].clone())
                with post.changed:
                    post.read.add((source, self.position, message))
                    post.changed.notify_all()
            mine = {(self.position, reader, message) for reader in readers}
            with post.changed:
                assert post.changed.wait_for(lambda: mine <= post.read, timeout=20)
            return made(read)

        return wait


def places_of(layout: Layout) -> list[tuple[Mesh, Transport]]:
    """Of all ranks: a machine for each Ulysses group."""
    u, r = layout.ulysses, layout.ring
    sequence, rings = Post(layout.ranks), [Post(r) for _ in range(u)]
    grounds = [Ground(u) for _ in range(r)]
    places = []
    for rank in range(layout.ranks):
        groups = {
            "sequence": SimpleNamespace(post=sequence, position=rank),
            "ulysses": SimpleNamespace(ground=grounds[rank // u], position=rank % u),
            "ring": SimpleNamespace(post=rings[rank % u], position=rank // u),
        }
        mesh = Mesh(layout=layout, device=CPU, sequence_position=rank, **groups)
        places.append((mesh, Transport(mesh, KIND)))
    return places


WIRES = [(None, 1e-6), (torch.int8, 0.03), (torch.uint8, 0.1)]
PLACES = [(2, 2, ThreadArena), (2, 2, MirroredArena), (2, 3, ThreadArena)]


@pytest.mark.parametrize(
    "ulysses, ring, arena, packed, bound, overlap",
    [
        pytest.param(*place, *wire, overlap, marks=() if (n + number + overlap) % 3 == 0 else pytest.mark.thorough)
        for n, place in enumerate(PLACES)
        for number, wire in enumerate(WIRES)
        for overlap in (True, False)
    ],
)
def test_ranks_agree_with_one(ulysses, ring, arena, packed, bound, overlap, monkeypatch):
    monkeypatch.setattr(transport, "allocate_together", lambda allocate, group: allocate())
    monkeypatch.setattr(transport, "GroupExchange", ThreadExchange)
    monkeypatch.setitem(
        transport._ARENAS, "symmetric memory", lambda group, device: arena(group.ground, group.position)
    )
    agree_with_one(places_of(Layout(ulysses=ulysses, ring=ring)), packed=packed, overlap=overlap, bound=bound)
