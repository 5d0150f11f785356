"""Memory that the ranks of a group reach, signals between them, and tensors laid out in that memory.

Two kinds of arena offer it: symmetric.py, where GPUs map each other's memory, and staged.py, by way of the host's.
peers.py orders what is written and read there, alike for both.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

CHANNELS = 16
"""Signals from one rank to another that may be under way at once."""
_ALIGNMENT = 256


class Arena(Protocol):
    """Memory of this rank that all ranks of a group reach. `position`, `peer`: positions in that group.

    hops: how many copies bring what a rank sends to where it is read.
    generation: changes when addresses that a CUDA graph has captured have moved.
    """

    position: int
    size: int
    hops: int
    generation: int

    def reserve(self, capacity: int) -> None:
        """Allocates so many bytes on every rank, unless there are as many. Collective where it grows."""

    def view(self, position: int, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor:
        """Returns where this rank writes for the rank at `position`, and reads what that one published, at byte
        `offset`."""

    def own(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor:
        """Returns this rank's memory on its own device."""

    def addresses(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor | None:
        """Returns where such a tensor begins in the memory of each rank, (P,) int64 on this rank's device, for kernels
        that write there themselves; None where they cannot."""

    def side_stream(self) -> AbstractContextManager:
        """Queues what is called inside on a stream of its own, behind what the main stream has been given so far."""

    def reading_stream(self) -> AbstractContextManager:
        """The same for what is read from peers, beside what this rank publishes."""

    def put_signals(self, peers: Iterable[int], channel: int) -> None:
        """Signals to `peers`, behind what was queued before on the current stream. They must have heard the last
        signal of this channel."""

    def wait_signals(self, peers: Iterable[int], channel: int) -> None:
        """Makes the current stream wait until all `peers` have signalled."""

    def publish(self, part: "Part") -> None:
        """Lets peers read a part of this rank's memory, once a signal says so."""

    def expect(self, peer: int, channel: int, parts: list["Part"]) -> None:
        """Announces that `peer` will write `parts` of this rank's memory and then signal."""

    def checkpoint(self) -> Callable[[], None]:
        """Returns what makes the main stream wait for what was expected and queued on the side stream so far, to be
        called once, ahead of `wait_all`, which waits for the rest."""

    def wait_all(self) -> None:
        """Makes the main stream wait until all that was expected has arrived and the side stream is done."""


@dataclass(frozen=True)
class Region:
    """A tensor at the same place in every rank's memory."""

    arena: Arena
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @cached_property
    def own(self) -> torch.Tensor:
        return self.arena.own(self.shape, self.dtype, self.offset)

    @cached_property
    def _views(self) -> list[torch.Tensor]:
        return [self.arena.view(p, self.shape, self.dtype, self.offset) for p in range(self.arena.size)]

    @cached_property
    def addresses(self) -> torch.Tensor | None:
        """See `Arena.addresses`."""
        return self.arena.addresses(self.shape, self.dtype, self.offset)

    def of(self, position: int) -> torch.Tensor:
        """Returns `Arena.view` of the rank at `position`."""
        return self._views[position]


@dataclass(frozen=True, slots=True)
class Part:
    """The part region[index]."""

    region: Region
    index: tuple = ()

    @property
    def own(self) -> torch.Tensor:
        return self.region.own[self.index]

    def of(self, position: int) -> torch.Tensor:
        return self.region.of(position)[self.index]


Shapes = list[tuple[tuple[int, ...], torch.dtype]]


def carve(arena: Arena, shapes: Shapes) -> list[Region]:
    """Lays out tensors of these shapes one after the other, from the arena's start. Collective."""
    sizes = [_aligned(*of) for of in shapes]
    arena.reserve(capacity(shapes))
    return [Region(arena, *of, sum(sizes[:i])) for i, of in enumerate(shapes)]


def capacity(shapes: Shapes) -> int:
    """Returns the bytes that `carve` reserves."""
    return sum(_aligned(*of) for of in shapes)


def _aligned(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
