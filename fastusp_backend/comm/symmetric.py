"""Ulysses' exchanges over symmetric memory: copy engines write straight into the peers' buffers, no SM is taken.

One arena per process group holds every buffer at the largest size met. Messages alternate between q/k/v and the
attended tokens, and a rank sends the next of one kind only after it has received the other kind from every peer,
which they sent after they had read the last one: one slot of each kind is enough, over any number of graph replays too.
"""

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from .shards import SequenceShards

# Signal channels: one per message that may be in flight at a time.
_RETURN, _FIRST_SEND = 0, 1
_ALIGNMENT = 256


class Arena:
    """A symmetric buffer of `group`, as bytes, that all its ranks grow together. `generation` counts its addresses."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.generation = 0
        self._capacity = 0
        self.handle = None

    def reserve(self, capacity: int) -> None:
        """Makes room for `capacity` bytes on every rank. Collective where it grows."""
        if capacity <= self._capacity:
            return
        torch.cuda.synchronize(self.device)
        self._buffer = symmetric_memory.empty(capacity, dtype=torch.uint8, device=self.device)
        self.handle = symmetric_memory.rendezvous(self._buffer, self.group)
        self._capacity = capacity
        self.generation += 1

    def view(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor:
        """Rank `rank`'s memory at byte `offset` as a tensor."""
        return self.handle.get_buffer(rank, shape, dtype, storage_offset=offset // dtype.itemsize)


class SymmetricExchange:
    """See `UlyssesExchange`."""

    def __init__(self, arena: Arena, shards: SequenceShards, batch: int, heads: int, dim: int, dtype: torch.dtype):
        self._arena, self._shards = arena, shards
        self.position = arena.rank
        local_heads = heads // arena.size
        gathered = (3, batch, shards.gathered, local_heads, dim)
        returned = (arena.size, batch, shards.local, local_heads, dim)
        offset = -(-torch.Size(gathered).numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        arena.reserve(offset + torch.Size(returned).numel() * dtype.itemsize)
        self._gathered = [arena.view(r, gathered, dtype, 0) for r in range(arena.size)]
        self._returned = [arena.view(r, returned, dtype, offset) for r in range(arena.size)]
        self.received = self._gathered[self.position]
        outgoing = (3, arena.size, batch, shards.local, local_heads, dim)
        self.outgoing = torch.empty(outgoing, dtype=dtype, device=arena.device)
        self._peers = [(self.position + i) % arena.size for i in range(1, arena.size)]
        self._in_flight = 0

    def send(self, which: slice, *, text: bool = True, image: bool = True) -> None:
        regions = self._shards.regions(self.position, text=text, image=image)
        channel = _FIRST_SEND + self._in_flight
        self._in_flight += 1
        with self._beside_the_main_stream():
            for peer in self._peers:
                for tensor in range(*which.indices(3)):
                    for rows, region in regions:
                        for b in range(self.received.shape[1]):
                            target = self._gathered[peer][tensor, b, region]
                            target.copy_(self.outgoing[tensor, peer, b, rows], non_blocking=True)
                self._arena.handle.put_signal(peer, channel)

    def wait(self) -> None:
        for channel in range(_FIRST_SEND, _FIRST_SEND + self._in_flight):
            for peer in self._peers:
                self._arena.handle.wait_signal(peer, channel)
        self._in_flight = 0
        self._join()

    def give_back(self, attended: torch.Tensor) -> None:
        self._attended = attended  # must not be reused while it travels
        with self._beside_the_main_stream():
            for target in [*self._peers, self.position]:
                for rows, region in self._shards.regions(target):
                    for b in range(attended.shape[0]):
                        self._returned[target][self.position, b, rows].copy_(attended[b, region], non_blocking=True)
                if target != self.position:
                    self._arena.handle.put_signal(target, _RETURN)

    def take_back(self) -> torch.Tensor:
        for peer in self._peers:
            self._arena.handle.wait_signal(peer, _RETURN)
        self._join()
        self._attended = None
        return self._returned[self.position].permute(1, 2, 0, 3, 4).flatten(2)

    def _beside_the_main_stream(self):
        self._arena.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._arena.stream)

    def _join(self) -> None:
        """What was sent from here has left its buffers, too, before they are written again."""
        torch.cuda.current_stream().wait_stream(self._arena.stream)
