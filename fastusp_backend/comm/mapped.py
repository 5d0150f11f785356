"""Host memory that all ranks of a machine map, each a piece of its own, pinned for their GPUs.

It has no name and goes with its last user: a rank opens the others' pieces through their /proc.
"""

import mmap
import os

import torch
import torch.distributed as dist

from ..pinning import pin, unpin
from .groups import all_gather_single


def map_memory_of_all(size: int, group: dist.ProcessGroup | None, *, pinned: bool) -> list[torch.Tensor]:
    """Returns `size` zeroed bytes (uint8) of every rank of a group, in its order; of this one alone where the group is
    None. All ranks of a group give the same size. Collective.

    Raises RuntimeError where they cannot be pinned.
    """
    descriptor = os.memfd_create("fastusp")
    try:
        os.ftruncate(descriptor, size)
        owners = torch.tensor([[os.getpid(), descriptor]])
        if group is not None:
            mine, owners = owners.view(-1), torch.empty(dist.get_world_size(group), 2, dtype=torch.int64)
            all_gather_single(owners.view(-1), mine, group=group)
        tensors = []
        for process, number in owners.tolist():
            with open(f"/proc/{process}/fd/{number}", "r+b", buffering=0) as file:
                tensors.append(torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8))
            if pinned:
                check(pin(tensors[-1]), "cuMemHostRegister")
        if group is not None:
            dist.all_reduce(torch.zeros(1), group=group)  # until all have opened it
    finally:
        os.close(descriptor)
    return tensors


def unpin_all(addresses: list[int], keep: int = 0) -> None:
    """Unpins the memory at all but the first `keep` addresses, which are taken off the list; memory that is freed while
    pinned cannot be pinned again at its address."""
    while len(addresses) > keep:
        check(unpin(addresses.pop()), "cuMemHostUnregister")


def check(code: int, name: str) -> None:
    """Raises RuntimeError where a call of CUDA's driver failed."""
    if int(code) != 0:
        raise RuntimeError(f"{name} failed with CUDA error {int(code)}")
