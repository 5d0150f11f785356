"""Exchanges between ranks that reach each other's memory, moved by copy engines: the order of signals and messages.

A rank copies its part straight to where its peers will read it (Ulysses, gather), or reads a peer's (ring), on a stream
beside the main one, and signals. The alternative, NCCL's collectives, are kernels: they take SMs from the products
behind which they are to be hidden, while the copy engines are idle. What copy engines do not bring is order, which is
this file's; an arena (arena.py) brings the memory, the signals and the stream.

A buffer is written again only when its readers are known to be done. Messages of Ulysses alternate between q/k/v and
attended tokens, and a rank sends the next of one kind only after it has received the other kind from every peer, which
they sent after they had read the last one: one slot of each kind is enough, over any number of graph replays. A
ring's block is read by its peers while they attend; they say when they are done, and only then are attended tokens
given back. The final gather has an arena of its own: a peer's next one comes after a whole step of other messages.
"""

from collections.abc import Iterator

import torch

from .arena import CHANNELS, Arena, Part, Region, carve
from .links import Block, Pending
from .shards import SequenceShards
from .wire import Wire, unpack_gathered, unpack_returned

_RETURN, _READY, _DONE, _FIRST_SEND = range(4)
"""Channels of signals. q, k and v may travel in several messages, each on its own channel: _FIRST_SEND and above."""


class PeerUlysses:
    """See `Ulysses`.

    members: the Ulysses group's positions in the arena, in its order.
    gathered: the region (3, B, N, h, D) of `received`, or where the wire is packed that of what arrives (3, U, B, L,
        pitch).
    returned: the region (U, B, L, *row) of the attended tokens that come back.
    """

    def __init__(
        self, members: list[int], shards: SequenceShards, wire: Wire, gathered: Region, returned: Region, batch: int
    ):
        self._arena, self._shards, self._wire, self._members = gathered.arena, shards, wire, members
        self._gathered, self._returned = gathered, returned
        self.position = members.index(self._arena.position)
        self._batch = batch
        device = gathered.own.device
        if wire.packed:
            received = (3, batch, shards.gathered, wire.heads, wire.dim)
            self.received = torch.empty(received, dtype=wire.dtype, device=device)
        else:
            self.received = gathered.own
        outgoing = (3, len(members), batch, shards.local, *wire.row)
        self.outgoing = torch.empty(outgoing, dtype=wire.carrier, device=device)
        self._targets = [(self.position + i) % len(members) for i in range(1, len(members))]
        self._in_flight: list[slice] = []
        self._attended: torch.Tensor | None = None

    def _arrival(self, source: int, tensors: range, *, text: bool, image: bool) -> list[tuple[Part, tuple]]:
        """Returns (where a source's rows lie at their destination, where they lie in its `outgoing` behind the
        target)."""
        parts = []
        for tensor in tensors:
            for rows, region in self._shards.regions(source, text=text, image=image):
                for b in range(self._batch):
                    index = (tensor, source, b, rows) if self._wire.packed else (tensor, b, region)
                    parts.append((Part(self._gathered, index), (b, rows)))
        return parts

    def send(self, which: slice, *, text: bool = True, image: bool = True) -> None:
        channel, tensors = _FIRST_SEND + len(self._in_flight), range(*which.indices(3))
        assert channel < CHANNELS
        self._in_flight.append(which)
        mine = self._arrival(self.position, tensors, text=text, image=image)
        with self._arena.side_stream():
            for target in self._targets:
                for part, rows in mine:
                    source = self.outgoing[(part.index[0], target, *rows)]
                    part.of(self._members[target]).copy_(source, non_blocking=True)
                self._arena.put_signal(self._members[target], channel)
        for source in self._targets:
            parts = [part for part, _ in self._arrival(source, tensors, text=text, image=image)]
            self._arena.expect(self._members[source], channel, parts)

    def wait(self) -> None:
        self._arena.wait_all()
        if self._in_flight and self._wire.packed:
            # In one go: these are one tensor where each message is awaited by itself, else mostly all three.
            came = slice(min(which.start for which in self._in_flight), max(which.stop for which in self._in_flight))
            packed, received = self._gathered.own[came], self.received[came]
            unpack_gathered(packed, received, self._shards, self.position, text=True, image=True)
        self._in_flight.clear()

    def give_back(self, attended: torch.Tensor) -> None:
        attended = attended.contiguous()  # copy engines move rows that lie in one piece
        rows_of = self._wire.encode(attended)
        self._attended, self._leaving = attended, rows_of  # must not be reused while they travel
        local = [(rows, b) for rows, _ in self._shards.regions(self.position) for b in range(self._batch)]
        with self._arena.side_stream():
            for target in self._targets:
                for rows, region in self._shards.regions(target):
                    for b in range(self._batch):
                        there = Part(self._returned, (self.position, b, rows)).of(self._members[target])
                        there.copy_(rows_of[b, region], non_blocking=True)
                self._arena.put_signal(self._members[target], _RETURN)
            if not self._wire.packed:
                for rows, region in self._shards.regions(self.position):
                    self._returned.own[self.position, :, rows].copy_(attended[:, region])
        for source in self._targets:
            parts = [Part(self._returned, (source, b, rows)) for rows, b in local]
            self._arena.expect(self._members[source], _RETURN, parts)

    def take_back(self) -> torch.Tensor:
        self._arena.wait_all()
        attended, self._attended, self._leaving = self._attended, None, None
        if self._wire.packed:
            return unpack_returned(self._returned.own, attended, self._shards, self.position)
        return self._returned.own.permute(1, 2, 0, 3, 4).flatten(2)


class PeerRing:
    """See `Ring`. Every rank reads each block straight from its owner, so nothing is forwarded and no rank waits for
    its neighbour.

    members: the ring's positions in the arena, in its order.
    block (2, B, N, *row): what peers read; where the wire is not packed it must be the memory that `rotate` is given.
    """

    def __init__(self, members: list[int], wire: Wire, block: Part):
        self._arena, self._wire, self._members, self._block = block.region.arena, wire, members, block
        self._position = members.index(self._arena.position)
        own = self._block.own
        self._buffers = [torch.empty_like(own) for _ in range(min(2, len(members) - 1))]
        shape = (*own.shape[:3], wire.heads, wire.dim)
        self._unpacked = torch.empty(shape, dtype=wire.dtype, device=own.device) if wire.packed else None

    def rotate(self, own: torch.Tensor, *, pipelined: bool) -> Iterator[Block]:
        arena, size = self._arena, len(self._members)
        others = [(self._position - hop) % size for hop in range(1, size)]
        if self._wire.packed:
            self._block.own.copy_(self._wire.encode(own.flatten(0, 1)).view_as(self._block.own))
        with arena.side_stream():
            arena.publish(self._block)
            for other in others:
                arena.put_signal(self._members[other], _READY)
        current = own
        for hop in range(size):
            owner = (self._position - hop) % size
            if hop < size - 1:
                self._pull(others[hop], self._buffers[hop % 2])
                if not pipelined:
                    arena.wait_all()
            yield owner, current
            if hop < size - 1:
                arena.wait_all()
                current = self._wire.decode_ring(self._buffers[hop % 2], self._unpacked)
        for other in others:
            arena.wait_signal(self._members[other], _DONE)

    def _pull(self, owner: int, buffer: torch.Tensor) -> None:
        peer = self._members[owner]
        with self._arena.side_stream():
            self._arena.wait_signal(peer, _READY)
            buffer.copy_(self._block.of(peer), non_blocking=True)
            self._arena.put_signal(peer, _DONE)


class PeerGather:
    """See `Gather`. For x of one shape."""

    def __init__(self, arena: Arena, shape: tuple[int, ...], dtype: torch.dtype):
        self._arena = arena
        (self._all,) = carve(arena, [((arena.size, *shape), dtype)])

    def all_gather(self, x: torch.Tensor) -> Pending:
        arena, x = self._arena, x.contiguous()
        others = [(arena.position + i) % arena.size for i in range(1, arena.size)]
        mine = Part(self._all, (arena.position,))
        with arena.side_stream():
            for other in others:
                mine.of(other).copy_(x, non_blocking=True)
                arena.put_signal(other, _FIRST_SEND)
            mine.own.copy_(x)
        for other in others:
            arena.expect(other, _FIRST_SEND, [Part(self._all, (other,))])

        def wait() -> torch.Tensor:
            arena.wait_all()
            x.numel()  # `x` lives in this closure: its memory must not be reused while it travels
            return self._all.own

        return wait
