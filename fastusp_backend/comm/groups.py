"""What every process group needs: its time limit, and to run out of memory on all ranks or on none.

Groups are made in mesh.py; collective.py moves tensors over them.
"""

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


class OutOfMemoryTogether(torch.OutOfMemoryError):
    """Memory ran out on rank `rank` of the pool; all ranks of its group raise this alike."""

    def __init__(self, rank: int, text: str):
        super().__init__(text)
        self.rank = rank


def world() -> tuple[int, int]:
    """Returns (this process's rank, how many ranks there are); (0, 1) without a process group."""
    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)


def allocate_together(allocate: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Returns what allocate() gives. Where memory ran out on any rank of the group, all of them raise
    OutOfMemoryTogether, so that none goes on alone into an exchange. allocate() may be collective if a rank fails in it
    only after its last exchange. Collective."""
    made, problem = None, ""
    try:
        made = allocate()
    except (RuntimeError, MemoryError) as error:  # CUDA's driver says it by a plain RuntimeError
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "out of memory" not in str(error):
            raise
        problem = str(error)
    failed = torch.tensor([world()[0] if problem else -1])
    dist.all_reduce(failed, dist.ReduceOp.MAX, group=group)
    if (rank := int(failed)) >= 0:
        raise OutOfMemoryTogether(rank, problem or f"memory ran out on rank {rank}")
    return made
