"""Weights out of a device's memory and back, by way of host memory that has each of them once.

The memory in which a model's tensors lie is moved as bytes, whatever the tensors are. What all ranks have is cut into P
shards, and each rank copies its own to the host; what one rank alone has, it copies whole. On the way back each rank
uploads its shard and gathers the other ranks'. A tensor stays the object that it was, with another address: the module
and the account of its patches go on, CUDA graphs do not.

Reading the file again instead would convert and patch again. Whole copies on all ranks would take P times the host
memory, and each device would upload all of it.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from ..comm.groups import all_gather_single, world
from ..host_memory import available
from ..pinning import pin, unpin

log = logging.getLogger(__name__)

_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a parked tensor lay, and lies again.

    range: the index of its range of memory.
    offset: values from the range's start to the tensor's first one.
    """

    tensor: torch.Tensor
    range: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


class HostShard:
    """This rank's shard of a model's weights: `park`, then `reserve` and `fetch`, in that order, on all ranks alike.

    The host memory (pinned for GPUs) stays until `close`, for the next time.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._rank, self._ranks = world()
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._places: list[_Place] = []
        self._sizes: list[int] = []  # bytes of this rank's shard of each range
        self._cuts: list[int] = []  # how many ranks have a shard of each range: all, or this one alone
        self._arriving: list[torch.Tensor] = []
        self._apart = 0  # bytes that were apart

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that this rank's shard takes."""
        return self._end + self._apart

    @property
    def _end(self) -> int:
        """Where the shards of tensors end."""
        return sum(self._sizes)

    def park(
        self, tensors: Sequence[torch.Tensor], own: Iterable[torch.Tensor] = (), apart: Sequence[torch.Tensor] = ()
    ) -> None:
        """Copies this rank's shard of a model's tensors to the host and empties them. own: those that no other rank
        has. apart: further memory of this rank alone, in pieces of uint8, which the caller empties. Raises MemoryError,
        the model untouched, where the host has no room."""
        alone = {id(tensor) for tensor in own}
        common, owned = (_ranges([t for t in tensors if (id(t) in alone) == whole]) for whole in (False, True))
        ranges, cuts = common + owned, [self._ranks] * len(common) + [1] * len(owned)
        sizes = [
            -(-len(whole) // (cut * _ALIGNMENT)) * _ALIGNMENT for (whole, _), cut in zip(ranges, cuts, strict=True)
        ]
        size_apart = sum(map(len, apart))
        self._make_room(sum(sizes) + size_apart)
        self._sizes, self._cuts, self._apart = sizes, cuts, size_apart
        for piece, copy in self._beside(apart):
            copy.copy_(piece, non_blocking=True)
        for (whole, _), shard, cut in zip(ranges, self._shards(), cuts, strict=True):
            mine = self._part(whole, len(shard), cut)
            shard[: len(mine)].copy_(mine, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._places = [
            _Place(t, i, (t.data_ptr() - whole.data_ptr()) // t.itemsize, t.shape, t.stride())
            for i, (whole, tensors) in enumerate(ranges)
            for t in tensors
        ]
        for place in self._places:
            place.tensor.data = torch.empty(0, dtype=place.tensor.dtype, device=self.device)

    def reserve(self) -> None:
        """Allocates what `fetch` fills. Raises torch.OutOfMemoryError."""
        if self._arriving:
            return
        sizes = [size * cut for size, cut in zip(self._sizes, self._cuts, strict=True)]
        like = {"dtype": torch.uint8, "device": self.device}
        if self.device.type == "cpu":  # in one piece, which goes back to the system when it is freed
            self._arriving = list(torch.empty(sum(sizes), **like).split(sizes))
        else:
            self._arriving = [torch.empty(size, **like) for size in sizes]

    def fetch(self, apart: Sequence[torch.Tensor] = ()) -> None:
        """Brings the weights back, and what was apart to `apart`. Collective."""
        pending = []
        for piece, copy in self._beside(apart):
            piece.copy_(copy, non_blocking=True)
        for whole, shard, cut in zip(self._arriving, self._shards(), self._cuts, strict=True):
            mine = self._part(whole, len(shard), cut)
            mine.copy_(shard, non_blocking=True)
            if cut > 1:  # gloo does not say that its input may lie inside its output; NCCL does
                mine = mine if mine.is_cuda else shard
                pending.append(all_gather_single(whole, mine, async_op=True))
        for work in pending:
            work.wait()
        for place in self._places:
            t, whole = place.tensor, self._arriving[place.range]
            offset = whole.storage_offset() // t.itemsize + place.offset
            t.data = torch.empty(0, dtype=t.dtype, device=t.device).set_(
                whole.untyped_storage(), offset, place.size, place.stride
            )
        self._arriving = []

    def close(self) -> None:
        """Gives the host memory back."""
        if self._memory.numel() and self.device.type == "cuda":
            code = unpin(self._memory.data_ptr())
            if code != 0:
                log.warning("parked weights' memory could not be unpinned (CUDA error %d)", code)
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._places, self._sizes, self._cuts, self._arriving = [], [], [], []
        self._apart = 0

    def _make_room(self, wanted: int) -> None:
        """Allocates host memory. Raises MemoryError where there is not enough for all ranks: they ask at the same time,
        each before the others have taken theirs."""
        if wanted <= len(self._memory):
            return
        self.close()
        have = available()
        if have is not None and wanted * self._ranks > have:
            raise MemoryError(
                f"{_gb(wanted * self._ranks)} of host memory are needed to park the weights, {_gb(have)} are available"
            )
        memory = torch.empty(wanted, dtype=torch.uint8)
        if self.device.type == "cuda":
            code = pin(memory)
            if code != 0:
                raise MemoryError(f"{_gb(wanted)} of host memory cannot be pinned (CUDA error {code})")
        self._memory = memory

    def _shards(self) -> Sequence[torch.Tensor]:
        """This rank's shard of each range, in host memory."""
        return self._memory[: self._end].split(self._sizes)

    def _beside(self, apart: Sequence[torch.Tensor]) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """What is apart, with its place in host memory."""
        places = self._memory[self._end : self._end + self._apart].split([len(piece) for piece in apart])
        return zip(apart, places, strict=True)

    def _part(self, whole: torch.Tensor, size: int, cut: int) -> torch.Tensor:
        """Where this rank's shard lies in a range."""
        return whole[self._rank * size : (self._rank + 1) * size] if cut > 1 else whole


def resident_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of tensors on this rank. What lies beside them in their storages, as in a mapped file, does not count."""
    return sum(len(whole) for whole, _ in _ranges(list(tensors)))


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    """A model's tensors; those on the meta device lie on other ranks."""
    return [tensor for tensor in chain(model.parameters(), model.buffers()) if not tensor.is_meta]


def _ranges(order: list[torch.Tensor]) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """The memory that tensors lie in, in pieces (n,) uint8, each with its tensors; those that overlap are in one piece.
    In the order of the tensors: addresses differ from rank to rank."""
    ranges: list[list] = []  # start, stop, indices of tensors
    for i in sorted(range(len(order)), key=lambda i: order[i].data_ptr()):
        start, stop = order[i].data_ptr(), order[i].data_ptr() + _extent(order[i])
        if ranges and start < ranges[-1][1]:
            ranges[-1][1] = max(ranges[-1][1], stop)
            ranges[-1][2].append(i)
        else:
            ranges.append([start, stop, [i]])
    ranges.sort(key=lambda r: min(r[2]))
    return [(_bytes(order[members[0]], stop - start), [order[i] for i in members]) for start, stop, members in ranges]


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first value to its last one."""
    if not tensor.numel():
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.itemsize


def _bytes(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """The memory from a tensor's first value on."""
    offset = tensor.storage_offset() * tensor.itemsize
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage(), offset, (count,))


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
