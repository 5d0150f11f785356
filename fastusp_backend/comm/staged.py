"""An arena through host memory, for GPUs of one host that cannot map each other's memory.

Every rank owns a mirror of its arena in pinned memory that all ranks map. A peer's copy engine writes into the mirror,
this rank's copy engine fetches it from there, and memory operations of the streams (cuStreamWaitValue32,
cuStreamWriteValue32) order the two: no SM and no CPU takes part, and a CUDA graph captures all of it.

CUDA's own copies between such GPUs go through the host as well, but within one process only. NCCL does so between
processes, by kernels on both sides, which take SMs from the computing. A CPU thread that waits and copies would need
to be woken for each message of each layer.
"""

import ctypes
import weakref
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from ..pinning import driver
from .arena import CHANNELS, Part
from .copies import copy
from .groups import allocate_together
from .mapped import check, map_memory_of_all, pin_all, unpin_all

_WAIT, _WRITE = 1, 2
_WAIT_EQUAL = 1


class _Operation(ctypes.Structure):
    """CUstreamBatchMemOpParams, of a wait for a value of 32 bits and of a write of one."""

    _fields_ = [
        ("kind", ctypes.c_int),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("alias", ctypes.c_uint64),
        ("unused", ctypes.c_uint64),
    ]


class StagedArena:
    """See `Arena`. group: ranks of one host."""

    hops = 2

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self._group, self._device = group, device
        self.position, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.generation = 0
        self._sending = torch.cuda.Stream(device, priority=-1)
        self._fetching = torch.cuda.Stream(device, priority=-1)
        self._busy: set[torch.cuda.Stream] = set()  # those with work that the main stream has not waited for
        self._pinned: list[int] = []
        # Before the memory itself is freed; at the process' end CUDA is gone first.
        weakref.finalize(self, unpin_all, self._pinned).atexit = False
        self._signals = self._map(4 * CHANNELS * self.size)
        self._slots = [_device_address(signals) for signals in self._signals]
        self._mirrors: list[torch.Tensor] = []
        self._capacity = 0

    def reserve(self, capacity: int) -> None:
        if capacity <= self._capacity:
            return
        torch.cuda.synchronize(self._device)
        # All ranks have come when this returns: nobody writes into what is about to go.
        self._buffer = allocate_together(
            lambda: torch.empty(capacity, dtype=torch.uint8, device=self._device), self._group
        )
        unpin_all(self._pinned, keep=len(self._signals))
        self._mirrors = self._map(capacity)
        self._capacity = capacity
        self.generation += 1

    def view(self, position: int, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor:
        return _typed(self._mirrors[position], shape, dtype, offset)

    def own(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor:
        return _typed(self._buffer, shape, dtype, offset)

    def addresses(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> None:
        return None  # what lies there is the host's memory, to which copy engines write

    def side_stream(self):
        return self._on(self._sending)

    def reading_stream(self):
        return self._on(self._fetching)

    def put_signals(self, peers: Iterable[int], channel: int) -> None:
        _stream_operations([(_WRITE, self._slot(peer, self.position, channel), 1) for peer in peers])

    def wait_signals(self, peers: Iterable[int], channel: int) -> None:
        slots = [self._slot(self.position, peer, channel) for peer in peers]
        _stream_operations([(_WAIT, slot, 1) for slot in slots] + [(_WRITE, slot, 0) for slot in slots])

    def publish(self, part: Part) -> None:
        part.of(self.position).copy_(part.own, non_blocking=True)

    def expect(self, peer: int, channel: int, parts: list[Part]) -> None:
        with self._on(self._fetching):
            self.wait_signals([peer], channel)
            for part in parts:
                copy(part.own, part.of(self.position))

    def checkpoint(self) -> Callable[[], None]:
        queued = [stream.record_event() for stream in self._busy]

        def wait() -> None:
            for event in queued:
                torch.cuda.current_stream().wait_event(event)

        return wait

    def wait_all(self) -> None:
        for stream in self._busy:  # the others are no part of a capture, which must not wait for them
            torch.cuda.current_stream().wait_stream(stream)
        self._busy.clear()

    def _on(self, stream: torch.cuda.Stream):
        stream.wait_stream(torch.cuda.current_stream())
        self._busy.add(stream)
        return torch.cuda.stream(stream)

    def _slot(self, receiver: int, sender: int, channel: int) -> int:
        """Returns the device address of a signal, which lies with its receiver."""
        return self._slots[receiver] + 4 * (sender * CHANNELS + channel)

    def _map(self, size: int) -> list[torch.Tensor]:
        """Returns `size` zeroed bytes of every rank, pinned here."""
        tensors = map_memory_of_all(size, self._group)
        self._pinned += pin_all(tensors, self._group)
        return tensors


def _typed(memory: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return memory[offset : offset + size].view(dtype).view(shape)


def _device_address(tensor: torch.Tensor) -> int:
    address = ctypes.c_uint64()
    check(
        driver().cuMemHostGetDevicePointer_v2(ctypes.byref(address), ctypes.c_void_p(tensor.data_ptr()), 0),
        "cuMemHostGetDevicePointer",
    )
    return address.value


def _stream_operations(operations: list[tuple[int, int, int]]) -> None:
    """Queues (kind, address, value) in this order, as one operation of the stream: of a graph one node."""
    told = (_Operation * len(operations))()
    for each, (kind, address, value) in zip(told, operations, strict=True):
        each.kind, each.address, each.value, each.flags = kind, address, value, _WAIT_EQUAL if kind == _WAIT else 0
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    check(driver().cuStreamBatchMemOp_v2(stream, len(told), told, 0), "cuStreamBatchMemOp")
