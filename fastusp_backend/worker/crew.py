"""How the ranks' CPUs agree: rank 0 decides, all follow, over a gloo group of their own.

Waiting for the next request is part of the job here, so the group's timeout is a year: nobody waits idle inside NCCL.
"""

import os
from datetime import timedelta

import msgspec
import safetensors.torch
import torch
import torch.distributed as dist

from ..ports import close_ports
from ..protocol import Places, SharedMemory, SharedTensors, inline_tensors

_SHARED = b"S"
"""In front of a `_Where`; no safetensors file starts so: its first byte is a multiple of 8."""


class _Where(msgspec.Struct, frozen=True):
    """path: of a descriptor of the memory; None for the lasting memory that all ranks have mapped."""

    path: str | None
    lasting: bool
    places: Places


class Crew:
    """All ranks of a pool. Every method is collective: all ranks call it in the same order.

    pins: lasting memory is pinned, for GPUs.
    """

    def __init__(self, *, pins: bool):
        self._pins = pins
        self._lasting: SharedMemory | None = None
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        close_ports()

    def share(self, payload: bytes | None) -> bytes:
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
        dist.broadcast(data, 0, group=self._group)
        return payload if payload is not None else data.numpy().tobytes()

    def share_tensors(self, tensors: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """Rank 0's tensors (contiguous, on the CPU), on every rank; the others pass None. Those in shared memory are
        mapped by all. What lies in lasting memory is there until the request is answered."""
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
            self._lasting = None

    def _send_tensors(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not isinstance(tensors, SharedTensors):
            self.share(safetensors.torch.save(tensors) if tensors else b"")
            return tensors
        memory = tensors.memory
        path = None if memory is self._lasting else f"/proc/{os.getpid()}/fd/{memory.fd}"
        self.share(_SHARED + msgspec.msgpack.encode(_Where(path, memory.lasting, tensors.places)))
        if path is not None:
            self.gather("")  # all have opened it
        return tensors

    def _receive_tensors(self) -> dict[str, torch.Tensor]:
        blob = self.share(None)
        if not blob.startswith(_SHARED):
            return inline_tensors(blob) if blob else {}
        where = msgspec.msgpack.decode(blob[1:], type=_Where)
        if where.path is None:
            return SharedTensors(self._lasting, where.places)
        fd = os.open(where.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            memory = SharedMemory(fd, lasting=where.lasting)
        finally:
            os.close(fd)
        self.gather("")
        return SharedTensors(memory, where.places)

    def agree(self, stop: bool) -> bool:
        """Rank 0's answer, on every rank."""
        if self.size == 1:
            return stop
        flag = torch.tensor([int(stop)], dtype=torch.uint8)
        dist.broadcast(flag, 0, group=self._group)
        return bool(flag)

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers, on every rank."""
        if self.size == 1:
            return number
        largest = torch.tensor([number])
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return int(largest)

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in rank order, on every rank. Where all are empty, as when nothing went wrong, one small
        message settles it."""
        if self.size == 1:
            return [text]
        if not self.most(len(text)):
            return [""] * self.size
        return [self._share_from(source, text) for source in range(self.size)]

    def _share_from(self, source: int, text: str) -> str:
        data = text.encode() if source == self.rank else b""
        length = torch.tensor([len(data)])
        dist.broadcast(length, source, group=self._group)
        buffer = torch.zeros(max(1, int(length)), dtype=torch.uint8)
        if data:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, source, group=self._group)
        return buffer.numpy().tobytes()[: int(length)].decode()
