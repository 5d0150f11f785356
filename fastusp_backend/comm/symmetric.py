"""An arena in symmetric memory, for GPUs of one host that map each other's memory (NVLink, or PCIe with peer access).

torch's symmetric memory gives a buffer of the same size on every rank that all of them map. A copy to a peer's buffer
is an ordinary copy, which a copy engine makes. Signals are words in such a buffer, by kernels of our own: torch's
signal to one peer at a time, and a step of 8 ranks would take some thousands of them. (Memory operations of streams
take longer than kernels in a graph: 8.0 us from rank to rank for 6.6, on H100s.)
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from ..kernels import signals
from .arena import CHANNELS, Part
from .groups import allocate_together

_met = 0


def meetings() -> int:
    """Returns how often this process has met others about symmetric memory. torch numbers the meetings of a process, in
    whatever group: ranks whose numbers differ wait for each other forever at the next."""
    return _met


def _meet(buffer: torch.Tensor, group: dist.ProcessGroup):
    global _met
    _met += 1
    return symmetric_memory.rendezvous(buffer, group)


class SymmetricArena:
    """See `Arena`."""

    hops = 1

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self._group, self._device = group, device
        self.position, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.generation = 0
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._capacity = 0
        self._signals: torch.Tensor | None = None
        self._expected: list[tuple[int, int]] = []

    def reserve(self, capacity: int) -> None:
        if capacity <= self._capacity:
            return
        torch.cuda.synchronize(self._device)
        if self._signals is None:
            self._make_signals()
        self._buffer = self._allocate(capacity, torch.uint8)
        self._handle = _meet(self._buffer, self._group)
        self._capacity = capacity
        self.generation += 1

    def view(self, position: int, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor:
        return self._handle.get_buffer(position, shape, dtype, storage_offset=offset // dtype.itemsize)

    def own(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor:
        return self.view(self.position, shape, dtype, offset)

    def addresses(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor:
        views = (self.view(position, shape, dtype, offset) for position in range(self.size))
        return torch.tensor([view.data_ptr() for view in views], device=self._device)

    def side_stream(self):
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    reading_stream = side_stream

    def put_signals(self, peers: Iterable[int], channel: int) -> None:
        signals.put(self._pads, _mask(peers), self.position * CHANNELS + channel)

    def wait_signals(self, peers: Iterable[int], channel: int) -> None:
        signals.wait(self._signals, _mask(peers), 1 << channel)

    def publish(self, part: Part) -> None:
        pass  # peers read this rank's memory itself

    def expect(self, peer: int, channel: int, parts: list[Part]) -> None:
        self._expected.append((peer, channel))

    def checkpoint(self) -> Callable[[], None]:
        expected, self._expected = self._expected, []
        queued = self._stream.record_event()

        def wait() -> None:
            self._wait(expected)
            torch.cuda.current_stream().wait_event(queued)

        return wait

    def wait_all(self) -> None:
        self._wait(self._expected)
        self._expected = []
        torch.cuda.current_stream().wait_stream(self._stream)

    def _wait(self, expected: list[tuple[int, int]]) -> None:
        """All peers send the same messages, so that these are some channels of some peers."""
        peers, channels = ({pair[i] for pair in expected} for i in (0, 1))
        assert len(expected) == len(peers) * len(channels), expected
        if expected:
            signals.wait(self._signals, _mask(peers), _mask(channels))

    def _make_signals(self) -> None:
        self._signals = self._allocate((self.size, CHANNELS), torch.int32).zero_()
        self._signals_handle = _meet(self._signals, self._group)
        views = (self._signals_handle.get_buffer(peer, self._signals.shape, torch.int32) for peer in range(self.size))
        self._pads = torch.tensor([view.data_ptr() for view in views], device=self._device)
        torch.cuda.synchronize(self._device)
        dist.all_reduce(torch.zeros(1), group=self._group)  # before anybody signals, all words are 0

    def _allocate(self, shape: int | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return allocate_together(lambda: symmetric_memory.empty(shape, dtype=dtype, device=self._device), self._group)


def _mask(numbers: Iterable[int]) -> int:
    return sum(1 << number for number in numbers)
