"""Weights out of the GPU and back: each rank keeps 1/P of them in host memory, so that a machine holds them once.

On the way back each rank uploads its share and the rest comes over the link. Storages are moved as bytes, whatever the
tensors in them are; a tensor stays the object that it was, with another address.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ..comm.exchange import all_gather_single

_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor's place in a storage."""

    tensor: torch.Tensor
    storage: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


class HostShare:
    """This rank's share of a model's weights: `park`, then `reserve` and `fetch`, in that order, on all ranks alike.

    The host memory (pinned for GPUs) stays until `close`, for the next time.
    """

    def __init__(self, device: torch.device):
        self.device = device
        there = dist.is_available() and dist.is_initialized()
        self._rank, self._ranks = (dist.get_rank(), dist.get_world_size()) if there else (0, 1)
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._places: list[_Place] = []
        self._shares: list[int] = []
        self._arriving: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes that this rank keeps in host memory."""
        return sum(self._shares)

    def park(self, model: nn.Module) -> None:
        """Copies this rank's share and empties the model's tensors. Raises MemoryError, the model untouched, where the
        host has no room."""
        tensors = [*model.parameters(), *model.buffers()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        order = {address: i for i, address in enumerate(storages)}
        unit = self._ranks * _ALIGNMENT
        shares = [-(-s.nbytes() // unit) * _ALIGNMENT for s in storages.values()]
        self._make_room(sum(shares))
        self._shares = shares
        for storage, kept in zip(storages.values(), self._memory.split([*shares, self._rest()])[:-1], strict=True):
            mine = self._mine(_as_bytes(storage), len(kept))
            kept[: len(mine)].copy_(mine, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._places = [
            _Place(t, order[t.untyped_storage().data_ptr()], t.storage_offset(), t.shape, t.stride()) for t in tensors
        ]
        for tensor in tensors:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=self.device)

    def reserve(self) -> None:
        """Allocates what `fetch` fills. Raises torch.OutOfMemoryError."""
        if not self._arriving:
            self._arriving = [
                torch.empty(share * self._ranks, dtype=torch.uint8, device=self.device) for share in self._shares
            ]

    def fetch(self) -> None:
        """Brings the weights back. Collective."""
        pending = []
        for whole, kept in zip(self._arriving, self._memory.split([*self._shares, self._rest()])[:-1], strict=True):
            mine = self._mine(whole, len(kept))
            mine.copy_(kept, non_blocking=True)
            if self._ranks > 1:  # gloo does not say that its input may lie inside its output; NCCL does
                mine = mine if mine.is_cuda else kept
                pending.append(all_gather_single(whole, mine, async_op=True))
        for work in pending:
            work.wait()
        for place in self._places:
            t = place.tensor
            storage = self._arriving[place.storage].untyped_storage()
            t.data = torch.empty(0, dtype=t.dtype, device=t.device).set_(
                storage, place.offset, place.size, place.stride
            )
        self._arriving = []

    def close(self) -> None:
        """Gives the host memory back."""
        if self._memory.numel() and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._places, self._shares, self._arriving = [], [], []

    def _make_room(self, wanted: int) -> None:
        if wanted <= len(self._memory):
            return
        self.close()
        have = _available()
        if have is not None and wanted * self._ranks > have:
            raise MemoryError(
                f"{_gb(wanted * self._ranks)} of host memory are needed to park the weights, {_gb(have)} are available"
            )
        memory = torch.empty(wanted, dtype=torch.uint8)
        if self.device.type == "cuda":
            # Not pin_memory: that rounds up to a power of two.
            code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), wanted, 0))
            if code != 0:
                raise MemoryError(f"{_gb(wanted)} of host memory cannot be pinned (cudaHostRegister: {code})")
        self._memory = memory

    def _mine(self, whole: torch.Tensor, share: int) -> torch.Tensor:
        return whole[self._rank * share : (self._rank + 1) * share]

    def _rest(self) -> int:
        return len(self._memory) - self.nbytes


def device_bytes(model: nn.Module) -> int:
    """Bytes of all storages of a model."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in [*model.parameters(), *model.buffers()]}
    return sum(storage.nbytes() for storage in storages.values())


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _available() -> int | None:
    """Bytes of host memory that can still be had; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
