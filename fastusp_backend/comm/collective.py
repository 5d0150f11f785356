"""Exchanges by a process group's own back end: gloo between CPU ranks, NCCL between GPUs.

Each is one of torch.distributed's asynchronous collectives, awaited when its result is asked for. GPUs of one host
take this way for what travels seldom (finished velocities of the batch axis, modulations); for what travels in each
layer peers.py says why not.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from .groups import all_gather_single
from .links import Block, Pending
from .shards import SequenceShards
from .wire import Wire, unpack_gathered, unpack_returned


class GroupExchange:
    """Exchanges in a group of P ranks, started here, awaited by what is returned; `position`: this rank's in it."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)
        self.position, self.size = self._ranks.index(dist.get_rank()), len(self._ranks)

    def shift(self, x: torch.Tensor) -> Pending:
        """Sends x to the next position, the last to the first; what arrives is the previous one's x, of the same
        shape.

        Of two it is the other one's either way, and comes by an all-gather: over sockets NCCL has more connections at
        work for that than for a message from rank to rank."""
        if self.size == 2:
            gathered = self.all_gather(x)
            return lambda: gathered()[1 - self.position]
        x = x.contiguous()
        out = torch.empty_like(x)
        following = self._ranks[(self.position + 1) % self.size]
        previous = self._ranks[(self.position - 1) % self.size]
        transfers = [
            dist.P2POp(dist.isend, x, following, self._group),
            dist.P2POp(dist.irecv, out, previous, self._group),
        ]
        return _awaiting(out, dist.batch_isend_irecv(transfers), x)

    def all_gather(self, x: torch.Tensor) -> Pending:
        """Gathers x (...) to (P, ...), every rank's x in the order of positions."""
        x = x.contiguous()
        out = x.new_empty(self.size, *x.shape)
        work = all_gather_single(out.view(-1), x.view(-1), group=self._group, async_op=True)
        return _awaiting(out, [work], x)


def _awaiting(out: torch.Tensor, works: list[dist.Work], sent: torch.Tensor) -> Pending:
    def wait() -> torch.Tensor:
        for work in works:
            work.wait()
        sent.numel()  # `sent` lives in this closure: its memory must not be reused while it travels
        return out

    return wait


class CollectiveUlysses:
    """See `Ulysses`. By the group's all-to-all."""

    in_turn = own_last = False

    def __init__(self, group: dist.ProcessGroup, shards: SequenceShards, batch: int, wire: Wire, device: torch.device):
        self._group, self._shards, self._wire = group, shards, wire
        self.position, self._size = dist.get_rank(group), dist.get_world_size(group)
        self.received = torch.empty(3, batch, shards.gathered, wire.heads, wire.dim, dtype=wire.dtype, device=device)
        outgoing = (3, self._size, batch, shards.local, *wire.row)
        self.outgoing = torch.empty(outgoing, dtype=wire.carrier, device=device)
        self._pending: list = []
        self._returning = None
        self._taken: torch.Tensor | None = None

    def peers_memory(self, which: slice, *, text: bool = True, image: bool = True) -> None:
        return None

    def send(self, which: slice, *, text: bool = True, image: bool = True) -> None:
        rows = slice(0 if text else self._shards.local_text, None if image else self._shards.local_text)
        sent = self.outgoing[which][:, :, :, rows].transpose(0, 1).contiguous()  # (U, T, B, R, *row)
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

    def give_back(self, attended: torch.Tensor, *, text_first: bool = False, own_later: bool = False) -> None:
        assert not own_later
        b, _, h, d = attended.shape
        sent = attended.new_empty(self._size, b, self._shards.local, h, d)
        for target in range(self._size):
            for rows, region in self._shards.regions(target):
                sent[target, :, rows] = attended[:, region]
        sent = self._wire.encode(sent.flatten(0, 1)).unflatten(0, (self._size, b))
        arrived = torch.empty_like(sent)
        work = dist.all_to_all_single(arrived, sent, group=self._group, async_op=True)
        self._returning = work, sent, arrived, attended

    def keep(self) -> None:
        pass

    def take_text(self) -> torch.Tensor:
        self._taken = self.take_back()  # all came in one message
        return self._taken

    def take_back(self) -> torch.Tensor:
        if self._taken is not None:
            taken, self._taken = self._taken, None
            return taken
        work, _, arrived, attended = self._returning
        work.wait()
        self._returning = None
        if self._wire.packed:
            return unpack_returned(arrived, attended, self._shards, self.position)
        return arrived.permute(1, 2, 0, 3, 4).flatten(2)  # (B, L, U, h, D): by the position that computed them


class CollectiveRing:
    """See `Ring`. Each rank forwards what it has received; a block is packed once, at its owner. An exact one is sent
    from where it lies: it has left when the second block is yielded, ahead of what the caller queues then."""

    keys_first = False

    def __init__(self, group: GroupExchange, wire: Wire):
        self._group, self._wire = group, wire
        self._first: Pending | None = None

    def start(self, own: torch.Tensor) -> None:
        self._first = self._group.shift(self._wire.encode(own.flatten(0, 1)).unflatten(0, own.shape[:2]))

    def rotate(self, own: torch.Tensor, *, pipelined: bool) -> Iterator[Block]:
        if self._first is None:
            self.start(own)
        arriving, self._first = self._first, None
        position, size = self._group.position, self._group.size
        current, unpacked = own, torch.empty_like(own) if self._wire.packed else own
        for hop in range(size):
            arrived = arriving() if arriving and not pipelined else None
            # After `hop` shifts this rank has the block of the position `hop` before its own.
            yield (position - hop) % size, current
            if arriving:
                block = arrived if arrived is not None else arriving()
                current = self._wire.decode_ring(block, unpacked)
                arriving = self._group.shift(block) if hop + 1 < size - 1 else None
