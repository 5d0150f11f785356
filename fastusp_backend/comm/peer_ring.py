"""The ring between ranks that reach each other's memory; see peers.py for the order."""

from collections.abc import Iterator

import torch

from . import messages
from .arena import Part
from .copies import copy
from .links import Block
from .wire import Wire


class PeerRing:
    """See `Ring`. Every rank reads each block straight from its owner, so nothing is forwarded and no rank waits for
    its neighbour.

    members: the ring's positions in the arena, in its order.
    block (2, B, N, *row): what peers read; where the wire is not packed it must be the memory that `start` and `rotate`
        are given.
    """

    def __init__(self, members: list[int], wire: Wire, block: Part):
        self._arena, self._wire, self._block = block.region.arena, wire, block
        self._position, size = members.index(self._arena.position), len(members)
        self._peers = [members[(self._position - hop) % size] for hop in range(1, size)]  # as their blocks are read
        self._started = False
        own = self._block.own
        self.keys_first = self._arena.hops > 1 and own[0].nbytes >= messages.TURN
        self._buffers = [torch.empty_like(own) for _ in range(min(2, size - 1))]
        self._pieces = self._in_pieces(own) if self._arena.hops > 1 else [()]
        assert len(self._pieces) <= messages.FIRST_SEND - messages.READY
        shape = (*own.shape[:3], wire.heads, wire.dim)
        self._unpacked = torch.empty(shape, dtype=wire.dtype, device=own.device) if wire.packed else None

    def start(self, own: torch.Tensor) -> None:
        if self._wire.packed:
            self._block.own.copy_(self._wire.encode(own.flatten(0, 1)).view_as(self._block.own))
        with self._arena.side_stream():
            for channel, piece in enumerate(self._pieces, messages.READY):
                self._arena.publish(self._piece(piece))
                self._arena.put_signals(self._peers, channel)
        self._pull(0)
        self._started = True

    def rotate(self, own: torch.Tensor, *, pipelined: bool) -> Iterator[Block]:
        if not self._started:
            self.start(own)
        self._started = False
        arena, size, current = self._arena, 1 + len(self._peers), own
        for hop in range(size):
            if 0 < hop < size - 1:
                self._pull(hop)
            if hop < size - 1 and not pipelined:
                arena.wait_all()
            yield (self._position - hop) % size, current
            if hop < size - 1:
                arena.wait_all()
                current = self._wire.decode_ring(self._buffers[hop % 2], self._unpacked)
        arena.wait_signals(self._peers, messages.DONE)

    def _pull(self, hop: int) -> None:
        """Reads the block that follows `hop` others."""
        peer = self._peers[hop]
        with self._arena.reading_stream():
            for channel, piece in enumerate(self._pieces, messages.READY):
                self._arena.wait_signals([peer], channel)
                copy(self._buffers[hop % 2][piece], self._piece(piece).of(peer))
            self._arena.put_signals([peer], messages.DONE)

    @staticmethod
    def _in_pieces(block: torch.Tensor) -> list[tuple[slice, ...]]:
        """Returns the parts of a block (2, B, N, *row) that are on their second hop while the next is on its first:
        keys, then values, each in halves where it is long, of the images or of the tokens of one."""
        if block.nbytes < messages.PIECE:
            return [()]
        dim = 1 if block.shape[1] > 1 else 2
        size = block.shape[dim]
        cut = (size + 1) // 2 if block[0].nbytes >= 2 * messages.PIECE else size
        halves = [slice(start, min(start + cut, size)) for start in range(0, size, cut)]
        return [(slice(t, t + 1), *[slice(None)] * (dim - 1), half) for t in range(2) for half in halves]

    def _piece(self, piece: tuple[slice, ...]) -> Part:
        """A piece of the block, which is a part of its region or all of it."""
        region, index = self._block.region, self._block.index
        if index and piece:
            first, (which, *rest) = index[0].start, piece
            return Part(region, (slice(first + which.start, first + which.stop), *rest))
        return Part(region, piece or index)
