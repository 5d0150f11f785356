"""Ulysses' two exchanges around attention, on buffers laid out as attention reads them.

Forward, a rank's q, k and v of the heads that rank u attends go to u; what arrives lies in the gathered sequence that
attention reads. Back, the attended tokens return to their owners. Sends start early and are awaited together, so a
schedule can put work between.

U Ulysses ranks, B batch, L local tokens [text, image], N = U L gathered tokens, H heads, h = H / U, D head dim.
"""

from typing import Protocol

import torch
import torch.distributed as dist

from .shards import SequenceShards
from .wire import Wire, unpack_gathered, unpack_returned

Q, K, V = range(3)


class UlyssesExchange(Protocol):
    """received (3, B, N, h, D): q, k, v of the gathered sequence, this rank's own part written by the caller.
    outgoing (3, U, B, L, *row), rows of the wire (see wire.py): payloads by destination, written by the caller
    before `send`; slot `position` is unused.
    """

    position: int
    received: torch.Tensor
    outgoing: torch.Tensor

    def send(self, which: slice, *, text: bool = True, image: bool = True) -> None:
        """Starts sending outgoing[which], its text rows, image rows or both."""

    def wait(self) -> None:
        """Orders what follows behind the arrival of all that was sent to this rank."""

    def give_back(self, attended: torch.Tensor) -> None:
        """Starts returning attended (B, N, h, D) tokens to their owners."""

    def take_back(self) -> torch.Tensor:
        """The attended tokens of this rank, all heads: (B, L, H D)."""


class LocalExchange:
    """One rank: nothing moves, the caller writes into `received` (3, B, N, H, D) itself."""

    position = 0

    def __init__(self, received: torch.Tensor):
        self.received = received
        self.outgoing = received.new_empty(3, 0, *received.shape[1:])
        self._attended: torch.Tensor | None = None

    def send(self, which: slice, *, text: bool = True, image: bool = True) -> None:
        pass

    def wait(self) -> None:
        pass

    def give_back(self, attended: torch.Tensor) -> None:
        self._attended = attended

    def take_back(self) -> torch.Tensor:
        return self._attended.flatten(2)


class CollectiveExchange:
    """By the group's own all-to-all: gloo on CPU ranks, NCCL on GPUs."""

    def __init__(self, group: dist.ProcessGroup, shards: SequenceShards, batch: int, wire: Wire, device: torch.device):
        self._group, self._shards, self._wire = group, shards, wire
        self.position, self._size = dist.get_rank(group), dist.get_world_size(group)
        self.received = torch.empty(3, batch, shards.gathered, wire.heads, wire.dim, dtype=wire.dtype, device=device)
        outgoing = (3, self._size, batch, shards.local, *wire.row)
        self.outgoing = torch.empty(outgoing, dtype=wire.carrier, device=device)
        self._pending: list = []
        self._returning = None

    def send(self, which: slice, *, text: bool = True, image: bool = True) -> None:
        rows = slice(0 if text else self._shards.local_text, None if image else self._shards.local_text)
        sent = self.outgoing[which][:, :, :, rows].transpose(0, 1).contiguous()  # (U, n, B, rows, *row)
        arrived = torch.empty_like(sent)
        work = dist.all_to_all_single(arrived, sent, group=self._group, async_op=True)
        self._pending.append((work, sent, arrived, which, text, image, rows.start))

    def wait(self) -> None:
        for work, _, arrived, which, text, image, first in self._pending:
            work.wait()
            if self._wire.packed:
                packed = arrived.transpose(0, 1).contiguous()
                unpack_gathered(packed, self.received[which], self._shards, self.position, text=text, image=image)
                continue
            for source in range(self._size):
                if source == self.position:
                    continue
                for rows, region in self._shards.regions(source, text=text, image=image):
                    part = arrived[source][:, :, rows.start - first : rows.stop - first]
                    self.received[which][:, :, region] = part
        self._pending.clear()

    def give_back(self, attended: torch.Tensor) -> None:
        b, _, h, d = attended.shape
        sent = attended.new_empty(self._size, b, self._shards.local, h, d)
        for target in range(self._size):
            for rows, region in self._shards.regions(target):
                sent[target, :, rows] = attended[:, region]
        sent = self._wire.encode(sent.flatten(0, 1)).unflatten(0, (self._size, b))
        arrived = torch.empty_like(sent)
        work = dist.all_to_all_single(arrived, sent, group=self._group, async_op=True)
        self._returning = work, sent, arrived, attended

    def take_back(self) -> torch.Tensor:
        work, _, arrived, attended = self._returning
        work.wait()
        self._returning = None
        if self._wire.packed:
            return unpack_returned(arrived, attended, self._shards, self.position)
        return arrived.permute(1, 2, 0, 3, 4).flatten(2)  # (B, L, U, h, D): chunk u holds rank u's heads
