"""Messages through the host's memory whose streams run late: what a rank queues is copied when a thread comes to it, in
the order of its stream, as it lies by then. The main stream computes at once, and reuses what it got back. So rows show
that are written or reused while a copy of them is still queued."""

import contextlib
import queue
import random
import threading
import time
from itertools import product

import pytest
import torch
from test_peers import CPU, Ground, MirroredArena, ThreadArena, agree_with_one

from fastusp_backend.comm import messages, peer_ring, peers
from fastusp_backend.comm.mesh import Mesh
from fastusp_backend.comm.transport import Transport
from fastusp_backend.config import Layout

pytestmark = pytest.mark.unit

running_on = threading.local()


class Stream:
    """Does what is queued on it, one after the other, late."""

    def __init__(self, seed: int):
        self.queued = self.done = 0
        self.failed: BaseException | None = None
        self._work, self._changed, self._dawdle = queue.Queue(), threading.Condition(), random.Random(seed)
        threading.Thread(target=self._run, daemon=True).start()

    def put(self, work) -> None:
        self.queued += 1
        self._work.put(work)

    def wait(self, count: int) -> None:
        with self._changed:
            came = self._changed.wait_for(lambda: self.failed or self.done >= count, timeout=30)
        assert came and not self.failed, self.failed or "hangs"

    def _run(self) -> None:
        while work := self._work.get():
            time.sleep(max(0.0, self._dawdle.random() - 0.5) * 4e-3)
            try:
                work()
            except BaseException as error:
                self.failed = self.failed or error
            with self._changed:
                self.done += 1
                self._changed.notify_all()


def do(work) -> None:
    """On the current stream, or at once."""
    stream = getattr(running_on, "stream", None)
    if stream is None:
        work()
    else:
        stream.put(work)


class StreamArena(MirroredArena):
    """With a stream that sends and one that fetches, as StagedArena has."""

    def __init__(self, ground: Ground, position: int):
        super().__init__(ground, position)
        self.sending, self.fetching = Stream(2 * position), Stream(2 * position + 1)

    @contextlib.contextmanager
    def _on(self, stream: Stream):
        before = getattr(running_on, "stream", None)
        running_on.stream = stream
        try:
            yield
        finally:
            running_on.stream = before

    def side_stream(self):
        return self._on(self.sending)

    def reading_stream(self):
        return self._on(self.fetching)

    def put_signals(self, peers, channel):
        do(lambda: ThreadArena.put_signals(self, list(peers), channel))

    def wait_signals(self, peers, channel):
        do(lambda: ThreadArena.wait_signals(self, list(peers), channel))

    def publish(self, part):
        do(lambda: part.of(self.position).copy_(part.own))

    def expect(self, peer, channel, parts):
        with self._on(self.fetching):
            self.wait_signals([peer], channel)
            do(lambda: self.fetch(parts))

    def checkpoint(self):
        counts = self.sending.queued, self.fetching.queued
        return lambda: [stream.wait(n) for stream, n in zip((self.sending, self.fetching), counts, strict=True)]

    def wait_all(self):
        self.checkpoint()()

    def end(self):
        for stream in (self.sending, self.fetching):
            stream.put(None)


@pytest.fixture
def late(monkeypatch):
    """Copies run on streams, and what was given back is spoilt as soon as it may be."""
    take_back = peers.PeerUlysses.take_back

    def spoil(self):
        attended = self._attended
        taken = take_back(self)
        if attended is not None:
            attended.fill_(torch.nan)
        return taken

    for module in (peers, peer_ring):
        monkeypatch.setattr(module, "copy", lambda target, source: do(lambda: target.copy_(source)))
    monkeypatch.setattr(peers.PeerUlysses, "take_back", spoil)


@pytest.mark.parametrize(
    "layout, packed, pieces",
    [
        pytest.param(*case, marks=pytest.mark.thorough if case[0] != (2, 1) and sum(map(bool, case[1:])) % 2 else ())
        for case in product(((2, 1), (4, 1), (1, 2), (1, 3), (2, 2)), (None, torch.int8), (False, True))
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 2])
def test_ranks_whose_streams_run_late_agree_with_one(late, monkeypatch, layout, packed, pieces, batch):
    """Of one image a ring's pieces are tokens, of two they are images."""
    for bound_of in ("PIECE", "TURN"):
        monkeypatch.setattr(messages, bound_of, 0 if pieces else 1 << 30)
    layout = Layout(ulysses=layout[0], ring=layout[1])
    grounds = Ground(layout.ranks), Ground(layout.ranks)
    places, arenas = [], []
    for rank in range(layout.ranks):
        ring = object() if layout.ring > 1 else None
        mesh = Mesh(layout=layout, device=CPU, sequence_position=rank, sequence=object(), ring=ring)
        places.append((mesh, Transport(mesh, "gloo")))
        arenas.append(StreamArena(grounds[0], rank))
        places[-1][1]._arenas = [arenas[-1], MirroredArena(grounds[1], rank)]
    try:
        agree_with_one(places, packed=packed, overlap=True, bound=0.03 if packed else 1e-6, batch=batch)
        assert not grounds[0].raised and not grounds[1].raised, "a signal was never heard"
    finally:
        for arena in arenas:
            arena.end()
