"""Memory that ranks share and map one behind the other, and the descriptors by which they get it."""

import contextlib
import os
import time

import pytest
import torch
import torch.distributed as dist
from pools import run_ranks

from fastusp_backend.comm import block_store, descriptors
from fastusp_backend.comm.block_store import PeerStore
from fastusp_backend.comm.descriptors import Mailbox, exchange_descriptors
from fastusp_backend.comm.groups import OutOfMemoryTogether
from fastusp_backend.comm.pages import HostPages

pytestmark = pytest.mark.dist
PAGE = 2 << 20


def join(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def no_more_than(count: int) -> bool:
    """Whether so many files are open, soon: gloo's threads open and close some of their own."""
    until = time.monotonic() + 10
    while open_files() > count and time.monotonic() < until:
        time.sleep(0.05)
    return open_files() <= count


def _exchange(rank: int, ranks: int, folder: str) -> None:
    """More than one message holds, and as many as the rank's number: each file says whose it is."""
    join(rank, ranks, folder)
    descriptors._MOST = 3
    dist.barrier()  # gloo's connections, made at their first use, are there
    before = open_files()
    with contextlib.ExitStack() as held:
        own = [os.memfd_create(f"{rank}.{i}") for i in range(5 * rank)]
        for i, descriptor in enumerate(own):
            held.callback(os.close, descriptor)
            os.write(descriptor, f"{rank}.{i}".encode())
        mailbox = held.enter_context(contextlib.closing(Mailbox()))
        found = exchange_descriptors(mailbox, own, dist.group.WORLD, held)
        said = [[os.pread(descriptor, 9, 0).decode() for descriptor in some] for some in found]
        assert said == [[f"{other}.{i}" for i in range(5 * other)] if other != rank else [] for other in range(ranks)]
    assert no_more_than(before) and not os.path.exists(mailbox.path)
    dist.destroy_process_group()


def test_every_rank_gets_all_descriptors(tmp_path):
    run_ranks(_exchange, 4, str(tmp_path), ranks=4)


class Failing(HostPages):
    """Fails in one of its calls."""

    def __init__(self, name: str):
        self.name = name

    def make(self, size):
        self.fail("make")
        return super().make(size)

    def open(self, descriptor, size):
        self.fail("open")
        return super().open(descriptor, size)

    def map(self, pieces):
        self.fail("map")
        return super().map(pieces)

    def fail(self, name):
        if name == self.name:
            raise torch.OutOfMemoryError(f"no memory to {name}")


def _refused(rank: int, ranks: int, folder: str) -> None:
    join(rank, ranks, folder)
    for name in ("make", "open", "map"):
        _refused_at(name, rank, ranks)
    dist.destroy_process_group()


def _refused_at(name: str, rank: int, ranks: int) -> None:
    parts, slots = [[PAGE] * ranks] * 3, [0, 1, 2]
    dist.barrier()  # gloo's connections are there
    before = open_files()
    store = PeerStore(parts, slots, HostPages())
    store.allocate_slots()
    slots_taken = open_files()
    if rank == 1:
        store._pages = Failing(name)
    with pytest.raises(OutOfMemoryTogether) as refused:
        store.allocate()
    assert refused.value.rank == 1 and store.own == []
    del refused
    assert no_more_than(slots_taken)
    store._pages = HostPages()
    store.allocate()  # there is room now
    store.block(2)[rank * PAGE] = rank + 1
    dist.barrier()
    for target, source in store.missing(2):
        target.copy_(source)
    assert store.block(2)[::PAGE].tolist() == [other + 1 for other in range(ranks)]
    assert store.nbytes == 3 * PAGE and store.slot_bytes == 3 * PAGE * (ranks - 1)
    dist.barrier()
    store.free()
    assert no_more_than(before), name


def test_one_rank_without_memory_is_refused_by_all_and_nothing_stays_open(tmp_path):
    run_ranks(_refused, 3, str(tmp_path), ranks=3)


def _too_many(rank: int, ranks: int, folder: str) -> None:
    """The others' descriptors do not get through to one of them."""
    import resource

    join(rank, ranks, folder)
    store = PeerStore([[PAGE] * ranks] * 40, [i % 2 for i in range(40)], HostPages())
    store.allocate_slots()
    before = open_files()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if rank == 0:  # its own parts, twice, and what the exchange takes
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 2 * 40 + 20, hard))
    with pytest.raises(OutOfMemoryTogether, match="too many open files|memory ran out on rank 0"):
        store.allocate()
    store.free()
    assert block_store.world() == (rank, ranks)
    dist.barrier()
    dist.destroy_process_group()


def test_too_many_open_files(tmp_path):
    run_ranks(_too_many, 2, str(tmp_path), ranks=2)
