"""How the ranks' CPUs agree: rank 0 decides, all follow, over a gloo group of their own.

Waiting for the next request is part of the job here, so the group's timeout is a year: nobody waits idle inside NCCL.
"""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import NoReturn

import msgspec
import torch
import torch.distributed as dist

from ..errors import ProtocolError, RequestError
from ..ports import close_ports
from ..protocol import ADVICE, Places, SharedMemory, SharedTensors, found, placed, put


class _Where(msgspec.Struct, frozen=True):
    """Where a request's tensors lie.

    path: of a descriptor of the memory; None for the lasting memory that all ranks have mapped.
    sent: the bytes in which they are sent next; None for tensors in shared memory.
    """

    places: Places
    path: str | None = None
    lasting: bool = False
    sent: int | None = None


class Unmapped(Mapping):
    """Tensors that a rank could not map: whatever looks at them raises RequestError, so that the request is refused
    when all ranks prepare it."""

    def __init__(self, text: str):
        self._text = text

    def _refuse(self, *_) -> NoReturn:
        raise RequestError(self._text)

    __getitem__ = __iter__ = __len__ = _refuse


class Crew:
    """All ranks of a pool. Every method is collective: all ranks call it in the same order.

    pins: lasting memory is pinned, for GPUs.
    one_machine: whether the ranks can map each other's memory. Where not, tensors are sent.
    """

    def __init__(self, *, pins: bool, one_machine: bool = True):
        self._pins, self._one_machine = pins, one_machine
        self._lasting: SharedMemory | None = None
        self._missed: SharedMemory | None = None  # what others could not map: its sender will not send it again
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        close_ports()

    def broadcast(self, payload: bytes | None) -> bytes:
        """Rank 0's payload, on every rank; the others pass None."""
        if self.size == 1:
            return payload
        length = torch.tensor([len(payload) if payload is not None else 0])
        dist.broadcast(length, 0, group=self._group)
        if not length:
            return b""
        if payload is not None:
            data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        else:
            data = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(data)
        return payload if payload is not None else data.numpy().tobytes()

    def _broadcast(self, data: torch.Tensor) -> None:
        """Writes rank 0's bytes, whose number all know, over the others'."""
        if len(data):
            dist.broadcast(data, 0, group=self._group)

    def broadcast_tensors(self, tensors: dict[str, torch.Tensor] | None) -> Mapping[str, torch.Tensor]:
        """Rank 0's tensors (contiguous, on the CPU), on every rank; the others pass None. Those in shared memory are
        mapped by all, or `Unmapped` on all. What lies in lasting memory is there until the request is answered."""
        if self.size > 1:
            tensors = self._receive_tensors() if tensors is None else self._send_tensors(tensors)
        if isinstance(tensors, SharedTensors) and tensors.memory.lasting and tensors.memory is not self._lasting:
            self.unmap()
            self._lasting = tensors.memory
            if self._pins:
                self._lasting.pin()
        return tensors

    def unmap(self) -> None:
        """Lets go of lasting memory."""
        if self._lasting is not None:
            self._lasting.unpin()
        self._lasting = self._missed = None

    def _send_tensors(self, tensors: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        if not isinstance(tensors, SharedTensors) or not self._one_machine:
            places, size = placed(tensors)
            self.broadcast(msgspec.msgpack.encode(_Where(places, sent=size)))
            data = torch.empty(size, dtype=torch.uint8)
            put(tensors, places, data)
            self._broadcast(data)
            return tensors
        memory = tensors.memory
        path = None if memory is self._lasting else f"/proc/{os.getpid()}/fd/{memory.fd}"
        self.broadcast(msgspec.msgpack.encode(_Where(tensors.places, path, memory.lasting)))
        return tensors if path is None else self._all_or_none(tensors, "")

    def _receive_tensors(self) -> Mapping[str, torch.Tensor]:
        where = msgspec.msgpack.decode(self.broadcast(None), type=_Where)
        if where.sent is not None:
            data = torch.empty(where.sent, dtype=torch.uint8)  # where torch aligns it: products sum alike each time
            self._broadcast(data)
            return found(where.places, data)
        if where.path is None:
            return SharedTensors(self._lasting, where.places)
        tensors, problem = None, ""
        try:
            fd = os.open(where.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                tensors = SharedTensors(SharedMemory(fd, lasting=where.lasting), where.places)
            finally:
                os.close(fd)
        except OSError as error:
            problem = f"a request's shared memory cannot be opened: {error}; {ADVICE}"
        except ProtocolError as error:
            problem = str(error)
        return self._all_or_none(tensors, problem)

    def _all_or_none(self, tensors: SharedTensors | None, problem: str) -> Mapping[str, torch.Tensor]:
        """Once all ranks have opened the memory, or told why they cannot."""
        for rank, text in enumerate(self.all_gather(problem)):
            if text:
                self._missed = tensors.memory if self.rank == 0 else None
                return Unmapped(f"rank {rank}: {text}")
        return tensors

    def agree(self, stop: bool) -> bool:
        """Rank 0's answer, on every rank."""
        if self.size == 1:
            return stop
        flag = torch.tensor([int(stop)], dtype=torch.uint8)
        dist.broadcast(flag, 0, group=self._group)
        return bool(flag)

    def maximum(self, number: int) -> int:
        """The largest of the ranks' numbers, on every rank."""
        if self.size == 1:
            return number
        largest = torch.tensor([number])
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return int(largest)

    def all_numbers(self, numbers: list[float]) -> list[list[float]]:
        """Every rank's numbers, as many as this rank's, in rank order, on every rank."""
        if self.size == 1:
            return [numbers]
        mine = torch.tensor(numbers, dtype=torch.float64)
        everyones = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyones, mine, group=self._group)
        return [numbers.tolist() for numbers in everyones]

    def all_gather(self, text: str) -> list[str]:
        """Every rank's text, in rank order, on every rank. Where all are empty, as when nothing went wrong, one small
        message settles it."""
        if self.size == 1:
            return [text]
        if not self.maximum(len(text)):
            return [""] * self.size
        return [self._broadcast_from(source, text) for source in range(self.size)]

    def _broadcast_from(self, source: int, text: str) -> str:
        data = text.encode() if source == self.rank else b""
        length = torch.tensor([len(data)])
        dist.broadcast(length, source, group=self._group)
        buffer = torch.zeros(max(1, int(length)), dtype=torch.uint8)
        if data:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, source, group=self._group)
        return buffer.numpy().tobytes()[: int(length)].decode()
