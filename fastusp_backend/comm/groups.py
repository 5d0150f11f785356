"""What every process group needs: its time limit, and to run out of memory on all ranks or on none.

Groups are made in mesh.py; collective.py moves tensors over them.
"""

import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from ..pulse import COLD_CPU_SECONDS

GROUP_TIMEOUT = timedelta(seconds=2 * COLD_CPU_SECONDS)
"""Long enough for a rank that hangs to be found by its pulse before, and named; torch's own limits are ten and thirty
minutes."""

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""torch 2.13 renamed it; the old name warns there."""

T = TypeVar("T")

_PLAIN = re.compile(
    r"CUDA error: out of memory|\[enforce fail.*can't allocate memory|unable to mmap.*Cannot allocate memory"
)


class OutOfMemoryTogether(torch.OutOfMemoryError):
    """Memory ran out on rank `rank` of the pool; all ranks of its group raise this alike."""

    def __init__(self, rank: int, text: str):
        super().__init__(text)
        self.rank = rank


def is_out_of_memory(error: BaseException) -> bool:
    """Also where torch says it by a plain RuntimeError: for CPUs, mapped files, and CUDA beside its own allocator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _PLAIN.match(str(error)) is not None


def world() -> tuple[int, int]:
    """Returns (this process's rank, how many ranks there are); (0, 1) without a process group."""
    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)


def all_ranks() -> dist.ProcessGroup:
    """Returns the default group."""
    return dist.group.WORLD


def machine() -> int:
    """Returns the number of this rank's machine, by what torchrun has told it: two may have one hostname."""
    rank, ranks = world()
    return rank // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))


def one_machine() -> bool:
    """Whether all ranks share a machine, by what torchrun has told this one."""
    _, ranks = world()
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) >= ranks


def allocate_together(allocate: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Returns what allocate() gives. Where memory ran out on any rank of the group, all of them raise
    OutOfMemoryTogether, so that none goes on alone into an exchange. allocate() may be collective if a rank fails in it
    only after its last exchange. group: None for this rank alone. Collective."""
    made, problem, lacking = None, "", -1
    try:
        made = allocate()
    except (RuntimeError, MemoryError) as error:  # CUDA's driver says it by a plain RuntimeError
        if not is_out_of_memory(error) and "out of memory" not in str(error):
            raise
        problem, lacking = str(error), world()[0]
        if isinstance(error, OutOfMemoryTogether):  # of a part of the group
            lacking = error.rank
    failed = torch.tensor([lacking])
    if group is not None:
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=group)
    if (rank := int(failed)) >= 0:
        raise OutOfMemoryTogether(rank, problem or f"memory ran out on rank {rank}")
    return made
