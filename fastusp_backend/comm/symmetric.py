"""An arena in symmetric memory, for GPUs of one host that map each other's memory (NVLink, or PCIe with peer access).

torch's symmetric memory gives a buffer of the same size on every rank that all of them map, and signals that streams
send and wait for. A copy to a peer's buffer is an ordinary copy, which a copy engine makes.
"""

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from .arena import Part
from .groups import allocate_together


class SymmetricArena:
    """See `Arena`."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self._group, self._device = group, device
        self.position, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.generation = 0
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._capacity = 0
        self._expected: list[tuple[int, int]] = []

    def reserve(self, capacity: int) -> None:
        if capacity <= self._capacity:
            return
        torch.cuda.synchronize(self._device)
        self._buffer = allocate_together(
            lambda: symmetric_memory.empty(capacity, dtype=torch.uint8, device=self._device), self._group
        )
        self._handle = symmetric_memory.rendezvous(self._buffer, self._group)
        self._capacity = capacity
        self.generation += 1

    def view(self, position: int, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor:
        return self._handle.get_buffer(position, shape, dtype, storage_offset=offset // dtype.itemsize)

    def own(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor:
        return self.view(self.position, shape, dtype, offset)

    def side_stream(self):
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def put_signal(self, peer: int, channel: int) -> None:
        self._handle.put_signal(peer, channel)

    def wait_signal(self, peer: int, channel: int) -> None:
        self._handle.wait_signal(peer, channel)

    def publish(self, part: Part) -> None:
        pass  # peers read this rank's memory itself

    def expect(self, peer: int, channel: int, parts: list[Part]) -> None:
        self._expected.append((peer, channel))

    def wait_all(self) -> None:
        for peer, channel in self._expected:
            self.wait_signal(peer, channel)
        self._expected.clear()
        torch.cuda.current_stream().wait_stream(self._stream)
