"""Memory from which streamed blocks come to slots of the device: each rank owns a part of every block.

| kind | parts lie | fetched by |
|---|---|---|
| PeerStore | on the devices of ranks that reach each other's memory | a copy engine, out of the owners' memory |
| HostStore | in the host's memory, pinned, mapped by all ranks | a copy engine, over each GPU's own link |

Parts are equal: as much comes to every rank, at the same time. A rank computes with its own part where it lies, since
pages are mapped so that part and slot are one piece of memory: to copy it as well would cost a step as much as what
comes from the peer (power, and the memory's bandwidth). docs/design/weights.md has what else was measured.

A copy engine reads the owner's memory and tells nobody: blocks do not change while anybody computes. Whoever changes
one waits for all ranks before and after it, see engine/block_stream.py. NCCL's broadcasts are kernels, which take SMs
from the products, and a meeting of all ranks per block.
"""

import contextlib
import os
import weakref
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol

import torch
import torch.distributed as dist

from .descriptors import Mailbox, exchange_descriptors
from .groups import OutOfMemoryTogether, allocate_together, world
from .mapped import map_memory_of_all, pin_all, unpin_all
from .pages import Pages, Piece

COPY = 64 << 20
"""Bytes of one copy. Each costs some 15 us of a copy engine, and exchanges of tokens may have to wait for one."""


class BlockStore(Protocol):
    """Made with the sizes in bytes of all blocks' parts, one of each rank per block, and with the slot of each block.

    on_device: whether parts take memory of the device.
    own: this rank's parts, uint8; empty before `allocate`.
    nbytes: bytes of this rank's parts.
    slot_bytes: bytes of the device's slots.
    """

    on_device: bool
    nbytes: int
    slot_bytes: int

    @property
    def own(self) -> list[torch.Tensor]: ...

    def allocate_slots(self) -> None:
        """Allocates what is this rank's alone. Raises what torch raises."""

    def allocate(self) -> None:
        """Allocates the parts, unless they are there, and has blocks begin somewhere. Collective; raises
        OutOfMemoryTogether."""

    def block(self, number: int) -> torch.Tensor:
        """Returns where a block is while it computes, uint8."""

    def missing(self, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns what is to be copied before a block can compute: (target, source) pairs."""

    def write(self, number: int, start: int, data: torch.Tensor) -> None:
        """Writes bytes of a block, from `start` on, to the parts that they lie in."""

    def give_back(self, number: int, start: int, size: int) -> None:
        """Writes bytes of a block that was fetched, and changed, to the parts that they came from."""

    def leave(self) -> None:
        """Gives the device's memory back."""

    def free(self) -> None:
        """Gives all memory back."""


class _Store:
    in_place: bool
    """Whether an owner's part is where it computes."""

    def __init__(self, parts: Sequence[Sequence[int]], slots: Sequence[int]):
        self._rank, self._ranks = world()
        self._sizes, self._slot_of = [list(sizes) for sizes in parts], list(slots)
        self._starts = [[0, *accumulate(sizes)][:-1] for sizes in parts]
        self._parts: list[list[torch.Tensor]] = []  # of each block, rank by rank
        self._blocks: list[torch.Tensor] = []
        self.nbytes = sum(sizes[self._rank] for sizes in parts)

    @property
    def own(self) -> list[torch.Tensor]:
        return [parts[self._rank] for parts in self._parts]

    def block(self, number: int) -> torch.Tensor:
        return self._blocks[number]

    def missing(self, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for hop in range(1, self._ranks + 1):  # each rank begins with another one
            rank = (self._rank + hop) % self._ranks
            if self._comes(rank):
                start, part = self._starts[number][rank], self._parts[number][rank]
                there = self._blocks[number][start : start + len(part)]
                pairs += zip(there.split(COPY), part.split(COPY), strict=True)
        return pairs

    def write(self, number: int, start: int, data: torch.Tensor) -> None:
        for _, part, at in self._overlaps(number, start, len(data)):
            part.copy_(data[at : at + len(part)], non_blocking=True)

    def give_back(self, number: int, start: int, size: int) -> None:
        changed = self._blocks[number][start : start + size]
        for rank, part, at in self._overlaps(number, start, size):
            if self._comes(rank):
                part.copy_(changed[at : at + len(part)], non_blocking=True)

    def _comes(self, rank: int) -> bool:
        return rank != self._rank or not self.in_place

    def _overlaps(self, number: int, start: int, size: int) -> Iterator[tuple[int, torch.Tensor, int]]:
        """For each rank that has some of the bytes: it, its part of them, and how many lie before."""
        for rank, (first, part) in enumerate(zip(self._starts[number], self._parts[number], strict=True)):
            begin, end = max(start, first), min(start + size, first + len(part))
            if begin < end:
                yield rank, part[begin - first : end - first], begin - start


class PeerStore(_Store):
    """See `BlockStore`. For devices that reach each other's memory; parts are whole pages of it."""

    in_place = on_device = True

    def __init__(self, parts: Sequence[Sequence[int]], slots: Sequence[int], pages: Pages):
        super().__init__(parts, slots)
        self._pages = pages
        # A slot has a row of pieces for each of the others' parts: the smallest part takes the first of them, a larger
        # one more, since a piece can only be mapped whole.
        self._steps: dict[tuple[int, int], list[int]] = {}
        for slot in sorted(set(slots)):
            for rank in filter(self._comes, range(self._ranks)):
                sizes = sorted({part[rank] for part, of in zip(parts, slots, strict=True) if of == slot} | {0})
                self._steps[slot, rank] = [b - a for a, b in zip(sizes, sizes[1:], strict=False)]
        self._pieces: dict[tuple[int, int], list[Piece]] = {}
        self.slot_bytes = sum(map(sum, self._steps.values()))

    def allocate_slots(self) -> None:
        self._pieces = {place: [self._pages.make(size) for size in steps] for place, steps in self._steps.items()}

    def allocate(self) -> None:
        if self._parts:
            return
        group = dist.group.WORLD
        with contextlib.ExitStack() as held:  # a descriptor that stays open keeps memory, whoever refuses
            own, descriptors, mailbox = allocate_together(lambda: self._make(held), group)
            try:
                allocate_together(
                    lambda: self._map(own, exchange_descriptors(mailbox, descriptors, group, held)), group
                )
            except OutOfMemoryTogether:
                # Where all could be mapped, too: else the next call is no collective.
                self._blocks, self._parts = [], []
                raise

    def _make(self, held: contextlib.ExitStack) -> tuple[list[Piece | None], list[int], Mailbox]:
        """This rank's parts, descriptors of them for the others, and where theirs come in."""
        own = [self._pages.make(sizes[self._rank]) if sizes[self._rank] else None for sizes in self._sizes]
        descriptors = []
        try:
            for piece in own:
                if piece is not None:
                    descriptors.append(piece.descriptor())
                    held.callback(os.close, descriptors[-1])
            return own, descriptors, held.enter_context(contextlib.closing(Mailbox()))
        except OSError as error:
            raise MemoryError(str(error)) from error

    def _map(self, own: list[Piece | None], descriptors: list[list[int]]) -> None:
        theirs = [iter(of_rank) for of_rank in descriptors]
        for sizes, starts, slot, piece in zip(self._sizes, self._starts, self._slot_of, own, strict=True):
            row: list[Piece] = []
            for rank, size in enumerate(sizes):
                if size:
                    row += self._in_slot(slot, rank, size) if self._comes(rank) else [piece]
            block = self._pages.map(row)
            parts = [block[start : start + size] for start, size in zip(starts, sizes, strict=True)]
            for rank, size in enumerate(sizes):
                if size and self._comes(rank):
                    parts[rank] = self._pages.map([self._pages.open(next(theirs[rank]), size)])
            self._blocks.append(block)
            self._parts.append(parts)

    def _in_slot(self, slot: int, rank: int, size: int) -> list[Piece]:
        """The pieces of a slot that a part of another rank takes."""
        place = slot, rank
        reached = accumulate(self._steps[place])
        return [piece for piece, end in zip(self._pieces[place], reached, strict=True) if end <= size]

    def leave(self) -> None:
        self._blocks, self._parts, self._pieces = [], [], {}

    free = leave


class HostStore(_Store):
    """See `BlockStore`. One copy on the machine, for all of its ranks. pinned: for GPUs."""

    in_place = on_device = False

    def __init__(self, parts: Sequence[Sequence[int]], slots: Sequence[int], device: torch.device):
        super().__init__(parts, slots)
        self._device, self._pinned = device, []
        self._capacity = max(sum(sizes) for sizes in zip(*parts, strict=True))  # the same on all ranks
        self._slot_sizes = [
            max(sum(sizes) for sizes, of in zip(parts, slots, strict=True) if of == slot) for slot in sorted(set(slots))
        ]
        self.slot_bytes = sum(self._slot_sizes)
        # Before the memory itself is freed; at the process' end CUDA is gone first.
        weakref.finalize(self, unpin_all, self._pinned).atexit = False

    def allocate_slots(self) -> None:
        slots = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in self._slot_sizes]
        self._blocks = [slots[slot][: sum(sizes)] for slot, sizes in zip(self._slot_of, self._sizes, strict=True)]

    def allocate(self) -> None:
        if self._parts:
            return
        group = dist.group.WORLD if self._ranks > 1 else None
        memory = map_memory_of_all(self._capacity, group)
        if self._device.type == "cuda":
            self._pinned += pin_all(memory, group)
        by_rank = zip(memory, zip(*self._sizes, strict=True), strict=True)
        rows = [whole[: sum(sizes)].split(list(sizes)) for whole, sizes in by_rank]
        self._parts = [list(parts) for parts in zip(*rows, strict=True)]

    def leave(self) -> None:
        self._blocks = []

    def free(self) -> None:
        self.leave()
        unpin_all(self._pinned)
        self._parts = []
