"""Moving tensors between ranks: start an exchange, compute something else, await what arrived.

These run on the process group's own back end: gloo on CPU ranks, NCCL on GPUs. Ulysses' exchange is in ulysses.py,
the ring in ring.py, and both over memory that ranks share in peers.py.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""torch 2.13 renamed it; the old name warns there."""

Pending = Callable[[], torch.Tensor]
"""An exchange under way; calling it once waits and returns what arrived."""

T = TypeVar("T")


class OutOfMemoryTogether(torch.OutOfMemoryError):
    """Memory ran out on rank `rank` of the pool; all ranks of its group raise this alike."""

    def __init__(self, rank: int, text: str):
        super().__init__(text)
        self.rank = rank


def world() -> tuple[int, int]:
    """(this process's rank, how many there are); (0, 1) without a process group."""
    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)


def allocate_together(allocate: Callable[[], T], group: dist.ProcessGroup) -> T:
    """What allocate() gives. Where memory ran out on any rank of the group, all of them raise OutOfMemoryTogether,
    so that none goes on alone into an exchange. allocate() may be collective if a rank fails in it only after its last
    exchange. Collective."""
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


class GroupExchange:
    """P ranks in a row, by torch.distributed's asynchronous collectives."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)
        self.position, self.size = self._ranks.index(dist.get_rank()), len(self._ranks)

    def shift(self, x: torch.Tensor) -> Pending:
        """Sends x to the next rank of the ring; what arrives is the previous rank's x, of the same shape."""
        x = x.contiguous()
        out = torch.empty_like(x)
        following = self._ranks[(self.position + 1) % self.size]
        previous = self._ranks[(self.position - 1) % self.size]
        transfers = [
            dist.P2POp(dist.isend, x, following, self._group),
            dist.P2POp(dist.irecv, out, previous, self._group),
        ]
        return _awaiting(out, dist.batch_isend_irecv(transfers), x)

    def all_gather(self, x: torch.Tensor) -> Pending:
        """x (...) -> (P, ...), every rank's x in rank order."""
        x = x.contiguous()
        out = x.new_empty(self.size, *x.shape)
        work = all_gather_single(out.view(-1), x.view(-1), group=self._group, async_op=True)
        return _awaiting(out, [work], x)


def _awaiting(out: torch.Tensor, works: list[dist.Work], sent: torch.Tensor) -> Pending:
    def wait() -> torch.Tensor:
        for work in works:
            work.wait()
        sent.numel()  # `sent` lives in this closure: its memory must not be reused while it travels
        return out

    return wait
