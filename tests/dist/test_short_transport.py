"""Memory that runs out in one Ulysses group of several, whose sequence goes on between machines."""

import pytest
import torch
import torch.distributed as dist
from pools import run_ranks

from fastusp_backend.comm import transport
from fastusp_backend.comm.groups import OutOfMemoryTogether
from fastusp_backend.comm.mesh import make_mesh
from fastusp_backend.comm.shards import SequenceShards
from fastusp_backend.config import Layout

pytestmark = pytest.mark.dist

KIND = "host memory, nccl between machines"


class Short:
    """An arena that has no memory on the second machine: from the beginning, or when it is to grow."""

    generation = 0

    def __init__(self, group, when: str):
        self._there = dist.get_rank() >= 2
        self._when = when
        self.size, self.position = dist.get_world_size(group), dist.get_rank(group)
        self._run_out("made")

    def _run_out(self, when: str) -> None:
        if self._there and when == self._when:
            raise OutOfMemoryTogether(2, "memory ran out there")

    def reserve(self, capacity: int) -> None:
        self._run_out("grown")


def _work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=4)
    mesh = make_mesh(Layout(ulysses=2, ring=2), torch.device("cpu"))
    for when in ("made", "grown"):
        transport._ARENAS["host memory"] = lambda group, device, when=when: Short(group, when)
        with pytest.raises(OutOfMemoryTogether, match="memory ran out") as found:
            made = transport.Transport(mesh, KIND)
            assert when == "grown", "it was made all the same"
            made.connect(SequenceShards(mesh.layout, 4, 8), 1, 2, 8, torch.float32, packed=None, width=4)
        assert found.value.rank == 2, "who lacks it, not who hears of it"
    dist.destroy_process_group()


def test_all_ranks_of_the_sequence_hear_of_it(tmp_path):
    run_ranks(_work, str(tmp_path), ranks=4)
