"""Two ranks whose blocks travel change weights between evaluations, played by threads that dawdle: none computes with
half of a change. And the memory beneath: parts of several ranks, mapped one behind the other."""

import os
import random
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from support import SMALL

from fastusp_backend.comm import block_store
from fastusp_backend.comm.block_store import PeerStore
from fastusp_backend.comm.pages import HostPages
from fastusp_backend.config import FileState, ModelSpec
from fastusp_backend.engine import block_stream
from fastusp_backend.engine.block_stream import BlockStream
from fastusp_backend.models.files import storage_plans
from fastusp_backend.models.ownership import Ownership
from fastusp_backend.models.placement import PAGE, stream_count
from fastusp_backend.weights.stored import Stored
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = pytest.mark.unit
RANKS = 2
EVALUATIONS = 10


class Ground:
    """What the threads share."""

    def __init__(self):
        self.met = threading.Barrier(RANKS, timeout=20)
        self.local = threading.local()
        self.descriptors = [[] for _ in range(RANKS)]

    def turn(self):
        """From now on this rank dawdles, or does not."""
        self.local.seconds = self.local.random.choice((0, 8e-3))

    def dawdle(self):
        time.sleep(self.local.random.random() * self.local.seconds)


class ThreadStore(PeerStore):
    def __init__(self, ground, *arguments):
        super().__init__(*arguments)
        self._ground = ground

    def allocate(self):
        own = [self._pages.make(sizes[self._rank]) if sizes[self._rank] else None for sizes in self._sizes]
        for rank in range(RANKS):
            if rank != self._rank:
                pieces = [piece.descriptor() for piece in own if piece is not None]
                self._ground.descriptors[self._rank] = pieces  # of two ranks, for the other one
        self._ground.met.wait()
        others = self._ground.descriptors
        self._map(own, [[] if rank == self._rank else others[rank] for rank in range(RANKS)])


@pytest.fixture
def ground(monkeypatch):
    made = Ground()
    world = lambda: (made.local.rank, RANKS)  # noqa: E731
    monkeypatch.setattr(block_stream, "world", world)
    monkeypatch.setattr(block_store, "world", world)
    copy = block_stream._copy

    def slowly(pairs):
        for pair in pairs:
            made.dawdle()
            copy([pair])

    monkeypatch.setattr(block_stream, "_copy", slowly)
    dist = SimpleNamespace(all_reduce=lambda *_, **__: made.met.wait(), group=SimpleNamespace(WORLD=None))
    monkeypatch.setattr(block_stream, "dist", dist)
    return made


def play(ground, rank, failures):
    ground.local.rank, ground.local.random = rank, random.Random(rank)
    ground.turn()
    try:
        _life(ground, rank)
    except threading.BrokenBarrierError:
        pass
    except BaseException as error:
        failures.append(error)
        ground.met.abort()


def _life(ground, rank):
    with torch.device("meta"):
        model = SMALL.build()
    header = {model.file_key(name): TensorInfo(tuple(p.shape), torch.float32) for name, p in model.named_parameters()}
    spec = ModelSpec(path="", file=FileState(0, 0, 0, 0), storage=None, compute="float32")
    plans = storage_plans(model, header, spec)
    placement = stream_count(model, plans, Ownership(model, plans, RANKS), "shared", 4)
    slabs = placement.slabs
    assert all(min(slab.parts) > 0 for slab in slabs)
    where = ThreadStore(ground, [slab.parts for slab in slabs], [slab.slot for slab in slabs], HostPages())
    stream = BlockStream(model, placement, plans, where, torch.device("cpu"))
    stream.allocate()
    stream.share()
    for name in stream.names:
        stream.load(name, Stored(torch.zeros(plans[name].shape)))
    stream.meet()
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in stream.names}
    for version in range(EVALUATIONS):
        ground.turn()
        stream.prime(tokens=True)
        for block in range(4):
            stream.begin(block)
            for say in (stream.tokens_arrived, stream.tokens_returned):
                say()
                ground.dawdle()
                for name in slabs[block].offsets:
                    values = layers[name].weight
                    assert values.min() == values.max() == version, (rank, version, name)
        stream.end()
        ground.turn()
        with stream.changing():
            for name in stream.names:
                if stream.owner(name) == rank:
                    ground.dawdle()
                    stream.open(name)
                    layers[name].weight.add_(1)


def test_no_rank_computes_with_half_of_a_change(ground):
    failures = []
    threads = [threading.Thread(target=play, args=(ground, rank, failures)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures


def test_pieces_lie_one_behind_the_other_and_are_shared():
    pages = HostPages()
    first, second = pages.make(PAGE), pages.make(2 * PAGE)
    row, other = pages.map([first, second]), pages.map([second, first])
    assert row.numel() == other.numel() == 3 * PAGE and not row.any()
    row[PAGE - 1], row[PAGE] = 1, 2
    assert other[-1] == 1 and other[0] == 2 and other.sum() == 3
    theirs = pages.map([pages.open(second.descriptor(), 2 * PAGE)])
    theirs[1] = 4
    assert row[PAGE + 1] == 4


def test_what_was_mapped_goes_with_its_last_tensor():
    pages = HostPages()
    before = len(os.listdir("/proc/self/fd"))
    row = pages.map([pages.make(PAGE)])  # the piece is gone, its memory is not
    row[7] = 5
    view, address = row[4:8], row.data_ptr()
    assert len(os.listdir("/proc/self/fd")) == before
    del row
    assert view[3] == 5 and _is_mapped(address)
    del view
    assert not _is_mapped(address)


def _is_mapped(address):
    for line in open("/proc/self/maps"):
        start, end = (int(word, 16) for word in line.split()[0].split("-"))
        if start <= address < end and "memfd:fastusp" in line:
            return True
    return False


def test_memory_that_cannot_be_mapped_is_refused():
    pages = HostPages()
    with pytest.raises(MemoryError, match="cannot be mapped: "):
        pages.map([pages.make(1 << 60)])
