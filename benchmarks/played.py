"""One rank of many, whose peers the other GPU plays, or this one: see scale.py."""

import paths  # noqa: F401
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from fastusp_backend.comm.arena import CHANNELS
from fastusp_backend.comm.mapped import unpin_all
from fastusp_backend.comm.mesh import Mesh
from fastusp_backend.comm.shards import SequenceShards
from fastusp_backend.comm.staged import StagedArena, _device_address, _typed
from fastusp_backend.comm.symmetric import SymmetricArena
from fastusp_backend.comm.transport import Transport
from fastusp_backend.config import Layout


def seen_from_there(layout: Layout, peer: int) -> int:
    """Returns who the first rank is to its `peer`, both by the way from one to the other through Ulysses group and
    ring: what all ranks send in the same order arrives in this one's."""
    ring, ulysses = divmod(peer, layout.ulysses)
    return -ring % layout.ring * layout.ulysses + -ulysses % layout.ulysses


class WhereItIsFetched:
    """A region of the GPU that stands for a peer: what the first rank puts there comes to where it is fetched from, as
    what that peer's own peer would put there. Else what is fetched lies where nobody has written, and may come from
    memory in place of the processor's cache.

    region: as comm/transport.py lays it out. text: tokens of the whole sequence.
    """

    def __init__(self, region: torch.Tensor, layout: Layout, peer: int, text: int):
        self._region, self._ulysses = region, layout.ulysses
        self._sender = seen_from_there(layout, peer)
        self._local_text = SequenceShards(layout, text, 0).local_text

    def __getitem__(self, index: tuple) -> torch.Tensor:
        return self._region[self.there(index)]

    def there(self, index: tuple) -> tuple:
        """Returns the place of the same part from the other sender. Messages are told by what their places are made
        of: a ring's block, which its owner publishes, stays where it is."""
        source = self._sender % self._ulysses
        match index:
            case (slice() as which, int(), int() as image, slice() as rows):  # q, k and v, packed
                return which, source, image, rows
            case (slice() as which, int() as image, slice() as rows):
                text = self._ulysses * self._local_text
                local_image = (self._region.shape[2] - text) // self._ulysses
                ahead = source * (self._local_text if rows.start < text else local_image)
                return which, image, slice(rows.start + ahead, rows.stop + ahead)
            case (int(), int() as image, slice() as rows):  # attended tokens, packed
                return source, image, rows
            case (int() as image, slice() as rows, int()):
                return image, rows, source
            case (int(),):  # the final gather
                return (self._sender,)
            case _:
                return index


class PlayedSymmetric(SymmetricArena):
    """The first of a layout's ranks; the other GPU, or where there is one this one, stands for all its peers."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, *, layout: Layout):
        super().__init__(group, device)
        self._me, self._other, self._layout = self.position, self.size - 1 - self.position, layout
        self.position, self.size = 0, layout.ranks

    def view(self, position, shape, dtype, offset):
        real = self._me if position == 0 else self._other
        return self._handle.get_buffer(real, shape, dtype, storage_offset=offset // dtype.itemsize)

    def _make_signals(self) -> None:
        self._signals = self._allocate((self.size, CHANNELS), torch.int32).zero_()
        self._signals_handle = symmetric_memory.rendezvous(self._signals, self._group)
        there = self._signals_handle.get_buffer(self._other, self._signals.shape, torch.int32).data_ptr()
        senders = [seen_from_there(self._layout, peer) for peer in range(self.size)]
        self._pads = torch.tensor([there + 4 * CHANNELS * sender for sender in senders], device=self._device)
        torch.cuda.synchronize(self._device)
        dist.all_reduce(torch.zeros(1), group=self._group)


class PlayedStaged(StagedArena):
    """The same by way of the host's memory."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, *, layout: Layout, text: int):
        super().__init__(group, device)
        self._me, self._other, self._layout, self._text = self.position, self.size - 1 - self.position, layout, text
        self.position, self.size = 0, layout.ranks
        unpin_all(self._pinned)
        self._signals = self._map(4 * CHANNELS * self.size)
        self._slots = [_device_address(signals) for signals in self._signals]

    def view(self, position, shape, dtype, offset):
        if position == 0:
            return _typed(self._mirrors[self._me], shape, dtype, offset)
        region = _typed(self._mirrors[self._other], shape, dtype, offset)
        return WhereItIsFetched(region, self._layout, position, self._text)

    def _slot(self, receiver: int, sender: int, channel: int) -> int:
        if receiver == 0:
            return self._slots[self._me] + 4 * (sender * CHANNELS + channel)
        return self._slots[self._other] + 4 * (seen_from_there(self._layout, receiver) * CHANNELS + channel)


def played(layout: Layout, device: torch.device, peers: bool, text: int) -> tuple[Mesh, Transport]:
    """Returns the mesh of the first of so many ranks, and what moves its tensors. peers: whether GPUs reach each
    other's memory; text: tokens."""
    world = dist.group.WORLD
    groups = {
        "sequence": world,
        "ulysses": world if layout.ulysses > 1 else None,
        "ring": world if layout.ring > 1 else None,
    }
    mesh = Mesh(layout=layout, device=device, **groups)
    transport = Transport(mesh, "symmetric memory" if peers else "host memory")
    if peers:
        transport._arenas = [PlayedSymmetric(world, device, layout=layout) for _ in range(2)]
    else:
        transport._arenas = [PlayedStaged(world, device, layout=layout, text=text) for _ in range(2)]
    return mesh, transport
