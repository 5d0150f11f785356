"""Exchanges between ranks that reach each other's memory, moved by copy engines: the order of signals and messages.

A rank copies its part straight to where its peers will read it (Ulysses, gather), or reads a peer's (ring), on a stream
beside the main one, and signals. The alternative, NCCL's collectives, are kernels: they take SMs from the products
behind which they are to be hidden, while the copy engines are idle. What copy engines do not bring is order, which is
that of this file and of the ring's (peer_ring.py); an arena (arena.py) brings the memory, the signals and the stream.

A buffer is written again only when its readers are known to be done. Messages of Ulysses alternate between q/k/v and
attended tokens, and a rank sends the next of one kind only after it has received the other kind from every peer, which
they sent after they had read the last one: one slot of each kind is enough, and one word for each signal of a layer,
over any number of graph replays. (Where own tokens come last, attended ones leave while keys and values are still being
read. With two hops the next ones wait in the host's memory until this rank, behind that attention, fetches them; with
one they would overwrite.) A ring's block is read by its peers while they attend; they say when they are done,
and only then are attended tokens given back. The final gather has an arena of its own: a peer's next one comes after a
whole step of other messages.

What is too little for a copy to be worth its beginning, some microseconds, kernels write to peers themselves: q, k and
v that which lays them out, attended tokens one for all ranks. The order is the same.

Where the ring and the gather go by a group's collectives (transport.py), Ulysses' arena keeps this order: such a ring
has sent all of its block before attended tokens are given back, and such a gather has a part of every rank, which sent
it after it had read its last attended tokens. A step of another shape, whose messages lie elsewhere, follows that.
"""

from collections.abc import Callable, Iterator

import torch

from ..kernels.scatter import scatter
from . import messages
from .arena import CHANNELS, Part, Region
from .copies import copy
from .shards import SequenceShards
from .wire import Wire, unpack_gathered, unpack_returned

_WRITTEN = 1 << 20
"""Bytes to each peer up to which a kernel writes them there: of 0.5 to 4 MiB and all, by one run at 2, 4 and 8 ranks,
none was faster for FLUX.1 and Qwen-Image (benchmarks/results/2026-11-27-published.md)."""


class PeerUlysses:
    """See `Ulysses`.

    members: the Ulysses group's positions in the arena, in its order.
    gathered: the region (3, B, N, h, D) of `received`, or where the wire is packed that of what arrives (3, U, B, L,
        pitch).
    returned: the region (B, L, U, *row) of the attended tokens that come back, heads in their order; (U, B, L, pitch)
        where the wire is packed.
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
        self._peers = [members[target] for target in self._targets]
        self._sources = self._targets[::-1]  # in the order in which theirs arrive
        # Of what is packed the other side makes something else.
        bases = [None if wire.packed else region.addresses for region in (gathered, returned)]
        self._received_there, self._returned_there = (None if b is None else b[members] for b in bases)
        size = self._bytes(shards.local_image) if self._arena.hops > 1 else 0
        self.in_turn = size >= messages.TURN
        # Of more ranks the own part is shorter than what it is to hide.
        self.own_last = size >= messages.PIECE and len(members) == 2
        self._in_flight: list[slice] = []
        self._messages = 0  # of this layer, awaited or not: a channel is used again when all have heard it
        self._attended: torch.Tensor | None = None
        self._own_later = False
        self._wait_for_text: Callable[[], None] | None = None
        self._unpacked: torch.Tensor | None = None

    def _arrival(self, source: int, which: slice, *, text: bool, image: bool) -> list[tuple[Part, tuple]]:
        """Returns (where a source's rows of the tensors `which` lie at their destination, where they lie in its
        `outgoing` behind the target)."""
        parts = []
        for rows, region in self._shards.regions(source, text=text, image=image):
            for b in range(self._batch):
                index = (which, source, b, rows) if self._wire.packed else (which, b, region)
                parts.append((Part(self._gathered, index), (b, rows)))
        return parts

    def _rows(self, *, text: bool, image: bool) -> int:
        return self._shards.local_text * text + self._shards.local_image * image

    def _bytes(self, rows: int) -> int:
        """Of so many rows of one tensor, to a peer."""
        return self._batch * rows * torch.Size(self._wire.row).numel() * self._wire.carrier.itemsize

    def peers_memory(self, which: slice, *, text: bool = True, image: bool = True) -> torch.Tensor | None:
        size = (which.stop - which.start) * self._bytes(self._rows(text=text, image=image))
        return self._received_there if size <= _WRITTEN else None

    def send(self, which: slice, *, text: bool = True, image: bool = True) -> None:
        self._in_flight.append(which)
        written = self.peers_memory(which, text=text, image=image) is not None
        pieces = [which]
        if self._arena.hops > 1 and self._bytes(self._rows(text=text, image=image)) >= messages.PIECE:
            pieces = [slice(tensor, tensor + 1) for tensor in range(which.start, which.stop)]
        for piece in pieces:
            channel = messages.FIRST_SEND + self._messages
            assert channel < CHANNELS
            self._messages += 1
            mine = [] if written else self._arrival(self.position, piece, text=text, image=image)
            with self._arena.side_stream():
                for to in self._each_signalled(channel):
                    for part, rows in mine:
                        copy(part.of(self._members[to]), self.outgoing[(piece, to, *rows)])
            for source in self._sources:
                parts = [part for part, _ in self._arrival(source, piece, text=text, image=image)]
                self._arena.expect(self._members[source], channel, parts)

    def _each_signalled(self, channel: int) -> Iterator[int]:
        """Yields the Ulysses position of each peer, and signals to it what was queued since: at once where a part has
        another way to go, else to all together, which takes one kernel."""
        at_once = self._arena.hops > 1
        for to, peer in zip(self._targets, self._peers, strict=True):
            yield to
            if at_once:
                self._arena.put_signals([peer], channel)
        if not at_once:
            self._arena.put_signals(self._peers, channel)

    def wait(self) -> None:
        self._arena.wait_all()
        if self._in_flight and self._wire.packed:
            # In one go: these are one tensor where each message is awaited by itself, else mostly all three.
            came = slice(min(which.start for which in self._in_flight), max(which.stop for which in self._in_flight))
            packed, received = self._gathered.own[came], self.received[came]
            unpack_gathered(packed, received, self._shards, self.position, text=True, image=True)
        self._in_flight.clear()

    def give_back(self, attended: torch.Tensor, *, text_first: bool = False, own_later: bool = False) -> None:
        self._messages, self._own_later = 0, own_later
        assert not own_later or (self.own_last and attended.is_contiguous())  # `keep` reads what is written later
        attended = attended.contiguous()  # a token's heads in one piece
        rows_of = self._wire.encode(attended)
        self._attended, self._leaving = attended, rows_of  # must not be reused while they travel
        text, local = self._shards.local_text, self._shards.local
        if text_first:
            self._return(rows_of, messages.RETURN_TEXT, slice(0, text))
            self._wait_for_text = self._arena.checkpoint()
        first = text if text_first else 0
        cut = (first + local) // 2
        if self._arena.hops > 1 and self._bytes(local - cut) >= messages.PIECE:
            self._return(rows_of, messages.RETURN, slice(first, cut))
            self._return(rows_of, messages.RETURN_REST, slice(cut, local))
        else:
            self._return(rows_of, messages.RETURN, slice(first, local))

    def _return(self, rows_of: torch.Tensor, channel: int, rows: slice) -> None:
        """rows: which of the rows of each rank."""
        shards = self._shards
        with self._arena.side_stream():
            if self._returned_there is not None and self._bytes(rows.stop - rows.start) <= _WRITTEN:
                scatter(rows_of, self._returned_there, self.position, shards.local_text, shards.local_image, rows)
                self._arena.put_signals(self._peers, channel)
            else:
                for to in self._each_signalled(channel):
                    self._bring(rows_of, to, rows)
                if not self._wire.packed:
                    stop = min(rows.stop, shards.local_text) if self._own_later else rows.stop
                    self._bring(rows_of, self.position, slice(rows.start, stop))
        for source in self._sources:
            parts = [self._place_of(source, b, mine) for mine, _ in self._within(0, rows) for b in range(self._batch)]
            self._arena.expect(self._members[source], channel, parts)

    def keep(self) -> None:
        if self._wire.packed:  # see `take_back`
            return
        with self._arena.side_stream():
            self._bring(self._attended, self.position, slice(self._shards.local_text, self._shards.local))

    def _bring(self, rows_of: torch.Tensor, to: int, rows: slice) -> None:
        for theirs, region in self._within(to, rows):
            for b in range(self._batch):
                part = self._place_of(self.position, b, theirs)
                copy(part.own if to == self.position else part.of(self._members[to]), rows_of[b, region])

    def _within(self, member: int, rows: slice) -> list[tuple[slice, slice]]:
        """A member's local rows by stream, and where they lie in what is gathered."""
        found = []
        for local, region in self._shards.regions(member):
            start, stop = max(rows.start, local.start), min(rows.stop, local.stop)
            if start < stop:
                found.append(
                    (slice(start, stop), slice(region.start + start - local.start, region.start + stop - local.start))
                )
        return found

    def _place_of(self, source: int, b: int, rows: slice) -> Part:
        """Where attended rows of an image come back, of the heads that `source` attends."""
        return Part(self._returned, (source, b, rows) if self._wire.packed else (b, rows, source))

    def take_text(self) -> torch.Tensor:
        if self._wire.packed:
            self._unpacked = self.take_back()
            return self._unpacked
        wait, self._wait_for_text = self._wait_for_text, None
        wait()
        return self._returned.own.flatten(2)

    def take_back(self) -> torch.Tensor:
        if self._unpacked is not None:
            unpacked, self._unpacked = self._unpacked, None
            return unpacked
        if self._wait_for_text is not None:
            self._wait_for_text()
            self._wait_for_text = None
        self._arena.wait_all()
        attended, self._attended, self._leaving = self._attended, None, None
        if self._wire.packed:
            return unpack_returned(self._returned.own, attended, self._shards, self.position)
        return self._returned.own.flatten(2)
