"""Chooses how the ranks of a sequence move tensors, once per layout, and makes the links that do.

| kind | where | links |
|---|---|---|
| symmetric memory | GPUs that map each other's memory | peers.py over symmetric.py |
| host memory | GPUs of one host that do not | peers.py over staged.py |
| one of these, nccl between machines | several hosts, Ulysses inside each | Ulysses so, ring and gather as below |
| nccl, gloo | other GPUs of several hosts; CPU ranks | collective.py |
| none | one rank | nothing is sent |

It takes the first that the ranks' devices allow; peers.py and staged.py say why. All ranks of a sequence must choose
alike, or they would wait for each other forever, so they exchange what each can reach and take the least.
"""

import os
import socket
import zlib
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from ..config import WireChoice
from ..kernels import signals
from .arena import Arena, Part, Shapes, capacity, carve
from .collective import CollectiveRing, CollectiveUlysses, GroupExchange
from .groups import all_gather_single, allocate_together, machine
from .link_speed import measure_link_speed
from .links import Links, LocalUlysses, Ring, Ulysses
from .mesh import Mesh
from .peer_gather import PeerGather
from .peer_ring import PeerRing
from .peers import PeerUlysses
from .shards import SequenceShards
from .staged import StagedArena
from .symmetric import SymmetricArena
from .wire import Wire, WireFormat, decide_wire

Kind = Literal[
    "none",
    "symmetric memory",
    "host memory",
    "symmetric memory, nccl between machines",
    "host memory, nccl between machines",
    "nccl",
    "gloo",
]
_ARENAS = {"symmetric memory": SymmetricArena, "host memory": StagedArena}
_BETWEEN = ", nccl between machines"
T = TypeVar("T")


class Transport:
    """Makes the links of one mesh. Made on all ranks together. kind: given for measurements alone, in place of the one
    that is chosen."""

    def __init__(self, mesh: Mesh, kind: Kind | None = None):
        self._mesh = mesh
        self.kind: Kind = kind or _choose(mesh)
        self._between = self.kind.endswith(_BETWEEN)  # the one arena is the Ulysses group's
        make = self._make_arena = _ARENAS.get(self.kind.removesuffix(_BETWEEN))
        # The gather's memory must not be another message's in a step of another shape: see peers.py.
        groups = [] if make is None else [mesh.ulysses] if self._between else [mesh.sequence] * 2
        self._arenas: list[Arena] = self._together(lambda: [make(group, mesh.device) for group in groups])
        self._speed: float | None = None
        self._wire: WireFormat | None = None

    def __str__(self) -> str:
        """Returns, for people, how tensors move and which format was last asked for."""
        digits = 2 if self._speed is not None and self._speed < 10 else 0  # of networks of 10 Gbit/s, too
        speed = f" ({self._speed:.{digits}f} GB/s)" if self._speed is not None else ""
        return f"{self.kind}{speed}" + (f", {self._wire} wire" if self._wire and self.kind != "none" else "")

    def wire(self, choice: WireChoice) -> WireFormat:
        """Returns what the ranks send: see `decide_wire`. `auto` measures the link, once, unless CPU ranks share their
        memory; of two that of the ring, between machines. Collective; raises OutOfMemoryTogether."""
        if choice == "auto" and self._speed is None and self.kind not in ("none", "gloo"):
            over = (self._mesh.ring,) if self._between else (self._mesh.sequence, self._make_arena)
            self._speed = measure_link_speed(self._mesh, *over)
        self._wire = decide_wire(choice, self._speed)
        return self._wire

    @property
    def generation(self) -> int:
        """A number that changes when addresses that a CUDA graph has captured have moved."""
        return sum(arena.generation for arena in self._arenas)

    def connect(
        self,
        shards: SequenceShards,
        batch: int,
        heads: int,
        dim: int,
        dtype: torch.dtype,
        *,
        packed: torch.dtype | None,
        width: int,
    ) -> Links:
        """Makes buffers and messages for tensors of one shape. Collective.

        packed: the type that carries rows in 8 bits, see `Wire`.
        width: values per token of the final gather.
        """
        mesh = self._mesh
        wire = Wire(heads // mesh.layout.ulysses, dim, dtype, packed)
        if self._arenas:
            ulysses, ring = self._connect_peers(shards, batch, wire)
            if self._between:
                return Links(ulysses, ring, GroupExchange(mesh.sequence))
            return Links(ulysses, ring, PeerGather(self._arenas[1], (batch, shards.local_image, width), dtype))
        if mesh.ulysses is None:
            received = (3, batch, shards.local, wire.heads, dim)
            ulysses = LocalUlysses(torch.empty(received, dtype=dtype, device=mesh.device))
        else:
            ulysses = CollectiveUlysses(mesh.ulysses, shards, batch, wire, mesh.device)
        ring = CollectiveRing(GroupExchange(mesh.ring), wire) if mesh.ring else None
        return Links(ulysses, ring, GroupExchange(mesh.sequence) if mesh.sequence else None)

    def reserve(
        self,
        shards: SequenceShards,
        batch: int,
        heads: int,
        dim: int,
        dtype: torch.dtype,
        *,
        packed: torch.dtype | None,
        width: int,
    ) -> None:
        """Makes room for what `connect` makes with these, or less, which allocates nothing then. Collective.

        Batch groups connect for prompts of their own, but their memory must grow alike: torch numbers the meetings of a
        process's ranks about symmetric memory, and ranks of two groups that have met a different number of times would
        wait for each other forever in a third.
        """
        if not self._arenas:
            return
        wire = Wire(heads // self._mesh.layout.ulysses, dim, dtype, packed)
        gathered = (self._mesh.layout.sequence_ranks, batch, shards.local_image, width), dtype
        shapes = self._message_shapes(shards, batch, wire), [gathered]
        self._together(lambda: [arena.reserve(capacity(of)) for arena, of in zip(self._arenas, shapes, strict=False)])

    def _message_shapes(self, shards: SequenceShards, batch: int, wire: Wire) -> Shapes:
        """What a rank's ring and Ulysses' exchanges write to its arena."""
        u = self._mesh.layout.ulysses
        received = (3, batch, shards.gathered, wire.heads, wire.dim), wire.dtype
        arrivals = (3, u, batch, shards.local, *wire.row), wire.carrier
        returned = (batch, shards.local, u, *wire.row), wire.carrier
        if wire.packed:
            returned = (u, batch, shards.local, *wire.row), wire.carrier
        shapes = [received]
        if u > 1:
            shapes = [arrivals if wire.packed else received, returned]
        if wire.packed and self._mesh.ring and not self._between:
            shapes.append(((2, batch, shards.gathered, *wire.row), wire.carrier))
        return shapes

    def _together(self, allocate: Callable[[], T]) -> T:
        """allocate() for an arena, which all ranks of its group leave alike where memory ran out. Where that group is
        not the sequence's, the sequence's other ranks do so, too: else they would go on into an exchange with it."""
        return allocate_together(allocate, self._mesh.sequence) if self._between else allocate()

    def _connect_peers(self, shards: SequenceShards, batch: int, wire: Wire) -> tuple[Ulysses, Ring | None]:
        mesh, u = self._mesh, self._mesh.layout.ulysses
        peers_ring = mesh.ring and not self._between
        regions = self._together(lambda: carve(self._arenas[0], self._message_shapes(shards, batch, wire)))
        if u > 1:
            first = 0 if self._between else mesh.ring_position * u
            members = [first + i for i in range(u)]
            ulysses = PeerUlysses(members, shards, wire, regions[0], regions[1], batch)
        else:
            ulysses = LocalUlysses(regions[0].own)
        if not peers_ring:
            return ulysses, CollectiveRing(GroupExchange(mesh.ring), wire) if mesh.ring else None
        members = [r * u + mesh.ulysses_position for r in range(mesh.layout.ring)]
        block = Part(regions[-1]) if wire.packed else Part(regions[0], (slice(1, 3),))
        return ulysses, PeerRing(members, wire, block)


def _choose(mesh: Mesh) -> Kind:
    if mesh.sequence is None:
        return "none"
    if mesh.device.type == "cpu":
        return "gloo"
    kinds: tuple[Kind, ...] = ("nccl", "host memory", "symmetric memory")
    closeness = _closeness(mesh.sequence)
    if closeness or not (mesh.ulysses and mesh.ring):
        return kinds[closeness]
    least = torch.tensor([_closeness(mesh.ulysses)])
    dist.all_reduce(least, dist.ReduceOp.MIN, group=mesh.sequence)  # other Ulysses groups may reach less
    return f"{kinds[int(least)]}{_BETWEEN}" if least else "nccl"


def reach_each_other(group: dist.ProcessGroup) -> bool:
    """Whether all GPUs of a group map each other's memory. Collective."""
    return _closeness(group) == 2


def _closeness(group: dist.ProcessGroup) -> int:
    """Returns 2 where every rank of a group can write to every other's memory, 1 where they share a host, else 0; the
    same on all of them. NCCL_P2P_DISABLE is respected."""
    host = zlib.crc32(f"{socket.gethostname()} {machine()}".encode())
    # Signals over peers' memory are kernels of Triton's.
    disabled = int(os.environ.get("NCCL_P2P_DISABLE", "0") == "1" or not signals.AVAILABLE)
    device = torch.cuda.current_device()
    mine = torch.tensor([host, device, disabled])
    members = mine.new_empty(dist.get_world_size(group), 3)
    all_gather_single(members.view(-1), mine, group=group)
    closeness = 2
    for other, peer, off in members.tolist():
        if other != host:
            closeness = 0
        elif off or not (peer == device or torch.cuda.can_device_access_peer(device, peer)):
            closeness = min(closeness, 1)
    verdict = torch.tensor([closeness])
    dist.all_reduce(verdict, dist.ReduceOp.MIN, group=group)  # access may be partial: all ranks choose alike
    return int(verdict)
