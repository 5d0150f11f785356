"""Memory from which streamed blocks come: each rank owns a piece of every block, and fetches the others'.

| kind | pieces lie | fetched by |
|---|---|---|
| PeerStore | on the GPUs, in symmetric memory | a copy engine, out of the owners' memory |
| HostStore | in the host's memory, pinned, mapped by all ranks | a copy engine, over each GPU's own link |
| BroadcastStore | on CPU ranks | broadcasts over gloo |

A piece is whole layers, and its owner computes from where it lies. With blocks cut into equal bytes, each rank would
have to copy its own part too, and that costs a step as much as what comes from the peer (power, and the memory's
bandwidth); with whole blocks owned in turn the ranks would be slow at different blocks, and wait for each other at
each (two H100: 1.27 times the step of weights that stay, for 1.09 of equal bytes).

A copy engine reads the owner's memory and tells nobody: blocks do not change while anybody computes. Whoever changes
one waits for all ranks before and after it, see engine/block_stream.py. NCCL's broadcasts are kernels, which take SMs
from the products, and a meeting of all ranks per block.
"""

import weakref
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import torch
import torch.distributed as dist

from .groups import allocate_together, world
from .mapped import map_memory_of_all, pin_all, unpin_all

PIECE = 64 << 20
"""Bytes of one copy. Each costs some 15 us of a copy engine, and exchanges of tokens may have to wait for one."""

Wait = Callable[[], None]
"""Waits for what no stream waits for."""


class BlockStore(Protocol):
    """Made with the sizes in bytes of all blocks' pieces: one of each rank per block.

    in_place: whether an owner computes from where its pieces lie.
    on_device: whether pieces take memory of the device.
    memory: this rank's pieces, uint8; empty before `allocate`.
    """

    in_place: bool
    on_device: bool
    memory: torch.Tensor

    def allocate(self) -> None:
        """Allocates the memory. Collective; raises OutOfMemoryTogether."""

    def own(self, block: int) -> torch.Tensor:
        """Returns this rank's piece of a block."""

    def place(self, block: int, rank: int) -> slice:
        """Returns where a rank's piece comes in what is fetched of a block."""

    def size(self, block: int) -> int:
        """Returns the bytes that are fetched of a block."""

    def fetch(self, block: int, target: torch.Tensor) -> Wait:
        """Copies what comes of a block to `target`, on the current stream."""

    def free(self) -> None:
        """Gives the memory back."""


class _Store:
    def __init__(self, sizes: Sequence[Sequence[int]]):
        self._rank, self._ranks = world()
        self._sizes = [list(pieces) for pieces in sizes]
        ends = [list(accumulate(pieces)) for pieces in zip(*sizes, strict=True)]  # rank by rank
        self._ends = list(zip(*ends, strict=True))
        self._capacity = max(end[-1] for end in ends)  # the same on all ranks
        self._of_ranks: list[torch.Tensor] = []

    @property
    def memory(self) -> torch.Tensor:
        return self._of_ranks[self._rank] if self._of_ranks else torch.empty(0, dtype=torch.uint8)

    def own(self, block: int) -> torch.Tensor:
        return self._piece(block, self._rank)

    def place(self, block: int, rank: int) -> slice:
        start = sum(self._sizes[block][other] for other in self._fetched() if other < rank)
        return slice(start, start + self._sizes[block][rank])

    def size(self, block: int) -> int:
        return sum(self._sizes[block][rank] for rank in self._fetched())

    def fetch(self, block: int, target: torch.Tensor) -> Wait:
        for hop in range(1, self._ranks + 1):  # each rank begins with another one
            rank = (self._rank + hop) % self._ranks
            if rank in self._fetched():
                there = target[self.place(block, rank)]
                for piece, source in zip(there.split(PIECE), self._piece(block, rank).split(PIECE), strict=True):
                    piece.copy_(source, non_blocking=True)
        return lambda: None

    def _fetched(self) -> list[int]:
        """The ranks whose pieces come."""
        return [rank for rank in range(self._ranks) if rank != self._rank or not self.in_place]

    def _piece(self, block: int, rank: int) -> torch.Tensor:
        end = self._ends[block][rank]
        return self._of_ranks[rank][end - self._sizes[block][rank] : end]


class PeerStore(_Store):
    """See `BlockStore`. For GPUs that map each other's memory."""

    in_place = on_device = True

    def __init__(self, sizes: Sequence[Sequence[int]], device: torch.device):
        super().__init__(sizes)
        self._device = device

    def allocate(self) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        size, group = self._capacity, dist.group.WORLD
        self._buffer = allocate_together(
            lambda: symmetric_memory.empty(size, dtype=torch.uint8, device=self._device), group
        )
        self._handle = symmetric_memory.rendezvous(self._buffer, group)
        self._of_ranks = [self._handle.get_buffer(rank, (size,), torch.uint8) for rank in range(self._ranks)]

    def free(self) -> None:
        self._of_ranks, self._handle, self._buffer = [], None, None


class HostStore(_Store):
    """See `BlockStore`. One copy on the machine, for all of its ranks. pinned: for GPUs."""

    in_place = on_device = False

    def __init__(self, sizes: Sequence[Sequence[int]], *, pinned: bool):
        super().__init__(sizes)
        self._pins, self._pinned = pinned, []
        # Before the memory itself is freed; at the process' end CUDA is gone first.
        weakref.finalize(self, unpin_all, self._pinned).atexit = False

    def allocate(self) -> None:
        group = dist.group.WORLD if self._ranks > 1 else None
        memory = map_memory_of_all(self._capacity, group)
        if self._pins:
            self._pinned += pin_all(memory, group)
        self._of_ranks = memory

    def free(self) -> None:
        unpin_all(self._pinned)
        self._of_ranks = []


class BroadcastStore(_Store):
    """See `BlockStore`. For CPU ranks, which evaluate the same blocks in the same order: each fetch is a meeting of all
    of them."""

    in_place = on_device = True

    def allocate(self) -> None:
        memory = allocate_together(lambda: torch.empty(self._capacity, dtype=torch.uint8), dist.group.WORLD)
        self._of_ranks = [memory] * self._ranks

    def fetch(self, block: int, target: torch.Tensor) -> Wait:
        pieces = [
            self.own(block) if rank == self._rank else target[self.place(block, rank)] for rank in range(self._ranks)
        ]
        pending = [dist.broadcast(piece, rank, async_op=True) for rank, piece in enumerate(pieces) if len(piece)]

        def wait() -> None:
            for work in pending:
                work.wait()

        return wait

    def free(self) -> None:
        self._of_ranks = []
