"""Keys and values passed round a ring of ranks: while one block is attended, the next is on its way.

Blocks are packed once, at their owner, and travel as bytes.
"""

from collections.abc import Iterator
from typing import Protocol

import torch

from .exchange import GroupExchange
from .wire import Wire

Block = tuple[int, torch.Tensor]
"""A ring position and its keys and values (2, B, N, h, D)."""


class Ring(Protocol):
    def rotate(self, own: torch.Tensor, *, pipelined: bool) -> Iterator[Block]:
        """own (2, B, N, h, D), this rank's keys and values -> all positions' blocks, the own one first. A block is
        valid until the next is asked for; the iterator must be exhausted. pipelined: the next one travels
        meanwhile."""


class CollectiveRing:
    """By the group's own sends and receives: each rank forwards what it has received."""

    def __init__(self, group: GroupExchange, wire: Wire):
        self._group, self._wire = group, wire

    def rotate(self, own: torch.Tensor, *, pipelined: bool) -> Iterator[Block]:
        position, size = self._group.position, self._group.size
        block = self._wire.encode(own.flatten(0, 1)).unflatten(0, own.shape[:2])
        current, unpacked = own, torch.empty_like(own) if self._wire.packed else own
        for hop in range(size):
            arriving = self._group.shift(block) if hop < size - 1 else None
            arrived = arriving() if arriving and not pipelined else None
            # After `hop` shifts this rank holds the block of the rank `hop` places before it.
            yield (position - hop) % size, current
            if arriving:
                block = arrived if arrived is not None else arriving()
                current = self._wire.decode_ring(block, unpacked)
