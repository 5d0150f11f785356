"""How the ranks' CPUs agree: rank 0 decides, all follow, over a gloo group of their own.

Waiting for the next request is part of the job here, so the group's timeout is a year: nobody waits idle inside NCCL.
"""

import os
from datetime import timedelta

import safetensors.torch
import torch
import torch.distributed as dist

from ..protocol import map_tensors, share_tensors

MAPPED = 1 << 20
"""Tensors of this many bytes together, such as a LoRA or a ControlNet's, are mapped by all ranks rather than sent to
each."""


class Crew:
    """All ranks of a pool. Every method is collective: all ranks call it in the same order."""

    def __init__(self):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))

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
        """Rank 0's tensors (contiguous, on the CPU), on every rank; the others pass None."""
        if self.size == 1:
            return tensors
        if tensors is None:
            blob = self.share(None)
            if not blob.startswith(b"/"):  # no safetensors file does: its first byte is a multiple of 8
                return safetensors.torch.load(blob) if blob else {}
            fd = os.open(blob, os.O_RDONLY | os.O_CLOEXEC)
            tensors = map_tensors(fd)
        elif sum(t.nbytes for t in tensors.values()) < MAPPED:
            self.share(safetensors.torch.save(tensors) if tensors else b"")
            return tensors
        else:
            fd = share_tensors(tensors)
            self.share(f"/proc/{os.getpid()}/fd/{fd}".encode())
        self.gather("")  # all have opened it
        os.close(fd)
        return tensors

    def agree(self, stop: bool) -> bool:
        """Rank 0's answer, on every rank."""
        if self.size == 1:
            return stop
        flag = torch.tensor([int(stop)], dtype=torch.uint8)
        dist.broadcast(flag, 0, group=self._group)
        return bool(flag)

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in rank order, on every rank. Where all are empty, as when nothing went wrong, one small
        message settles it."""
        if self.size == 1:
            return [text]
        longest = torch.tensor([len(text)])
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=self._group)
        if not longest:
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
