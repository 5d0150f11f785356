"""Host memory that all ranks of a machine map, each a piece of its own, pinned for their GPUs.

It has no name and goes with its last user: a rank opens the others' pieces through their /proc.
"""

import mmap
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..pinning import pin, unpin
from .groups import all_gather_single, allocate_together


def map_memory_of_all(size: int, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """Returns `size` zeroed bytes (uint8) of every rank of a group, in its order; of this one alone where the group is
    None. All ranks of a group give the same size. Collective; raises OutOfMemoryTogether.
    """
    descriptor = os.memfd_create("fastusp")
    try:
        os.ftruncate(descriptor, size)
        owners = torch.tensor([[os.getpid(), descriptor]])
        if group is not None:
            mine, owners = owners.view(-1), torch.empty(dist.get_world_size(group), 2, dtype=torch.int64)
            all_gather_single(owners.view(-1), mine, group=group)
        places = owners.tolist()
        return allocate_together(lambda: [_map(*place) for place in places], group)  # until all have opened it
    finally:
        os.close(descriptor)


def _map(process: int, descriptor: int) -> torch.Tensor:
    try:
        with open(f"/proc/{process}/fd/{descriptor}", "r+b", buffering=0) as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
    except OSError as error:
        raise MemoryError(f"memory of process {process} cannot be mapped: {error}") from error


def pin_all(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup | None) -> list[int]:
    """Pins memory of `map_memory_of_all` on all ranks, or on none; returns the addresses, for `unpin_all`. Collective;
    raises OutOfMemoryTogether."""
    own = tensors[0 if group is None else dist.get_rank(group)]
    # Pinning makes pages that nobody has touched one by one, at 1.5 GB/s; all threads together make them at 5.
    allocate_together(own[:: mmap.PAGESIZE].zero_, group)  # until all are there, or two ranks make the same ones

    def pin_own() -> list[int]:
        addresses: list[int] = []
        for tensor in tensors:
            if (code := int(pin(tensor))) != 0:
                unpin_all(addresses)
                raise MemoryError(f"{tensor.nbytes / 1e9:.1f} GB of host memory cannot be pinned (CUDA error {code})")
            addresses.append(tensor.data_ptr())
        return addresses

    return allocate_together(pin_own, group)


def unpin_all(addresses: list[int], keep: int = 0) -> None:
    """Unpins the memory at all but the first `keep` addresses, which are taken off the list; memory that is freed while
    pinned cannot be pinned again at its address."""
    while len(addresses) > keep:
        check(unpin(addresses.pop()), "cuMemHostUnregister")


def check(code: int, name: str) -> None:
    """Raises RuntimeError where a call of CUDA's driver failed."""
    if int(code) != 0:
        raise RuntimeError(f"{name} failed with CUDA error {int(code)}")
