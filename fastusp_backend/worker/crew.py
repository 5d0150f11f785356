"""How the ranks' CPUs agree: rank 0 decides, all follow, over a gloo group of their own.

Waiting for the next request is part of the job here, so the group's timeout is a year: nobody waits idle inside NCCL.
"""

from datetime import timedelta

import msgspec
import safetensors.torch
import torch
import torch.distributed as dist

LARGE = 256 * 1024
"""Bytes of a tensor above which it is sent by itself."""


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
        """Rank 0's tensors, on every rank's CPU; the others pass None. Large ones, as a ControlNet's, are sent from
        where they lie, without a copy."""
        if self.size == 1:
            return tensors
        first = tensors is not None
        large = {name: t.contiguous() for name, t in tensors.items() if t.nbytes > LARGE} if first else {}
        small = {name: t for name, t in tensors.items() if name not in large} if first else {}
        listed = [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in large.items()]
        listed = self.share(msgspec.json.encode(listed) if first else None)
        blob = self.share((safetensors.torch.save(small) if small else b"") if first else None)
        if not first:
            small = safetensors.torch.load(blob) if blob else {}
            for name, dtype, shape in msgspec.json.decode(listed):
                large[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        for tensor in large.values():
            dist.broadcast(tensor.flatten().view(torch.uint8), 0, group=self._group)
        return small | large

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
