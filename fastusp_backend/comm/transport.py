"""How the ranks of a mesh move tensors, chosen once: symmetric memory where GPUs map each other's memory, host memory
where they share a host alone, else the process group's own collectives (NCCL on GPUs, gloo on CPU ranks)."""

import os
import socket
import zlib
from typing import Literal

import torch
import torch.distributed as dist

from ..config import WireChoice
from .arena import Arena, Part, carve
from .collective import CollectiveExchange, CollectiveRing, GroupExchange
from .groups import all_gather_single
from .link_speed import measure_link_speed
from .links import Links, LocalExchange, Ring, UlyssesExchange
from .mesh import Mesh
from .peers import PeerExchange, PeerGather, PeerRing
from .shards import SequenceShards
from .staged import StagedArena
from .symmetric import SymmetricArena
from .wire import Wire, WireFormat, decide_wire

Kind = Literal["none", "symmetric memory", "host memory", "nccl", "gloo"]
_ARENAS = {"symmetric memory": SymmetricArena, "host memory": StagedArena}


class Transport:
    """Makes the links of one mesh; `kind` says how they move. Made on all ranks together. kind: for measurements, to
    have another than the one chosen."""

    def __init__(self, mesh: Mesh, kind: Kind | None = None):
        self._mesh = mesh
        self.kind: Kind = kind or _choose(mesh)
        make = self._make_arena = _ARENAS.get(self.kind)
        # The gather's memory must not be another message's in a step of another shape: see peers.py.
        self._arenas: list[Arena] = [make(mesh.sequence, mesh.device) for _ in range(2)] if make else []
        self._speed: float | None = None
        self._wire: WireFormat | None = None

    def __str__(self) -> str:
        """For people: how tensors move, and what the last wire asked for was."""
        speed = f" ({self._speed:.0f} GB/s)" if self._speed is not None else ""
        return f"{self.kind}{speed}" + (f", {self._wire} wire" if self._wire and self.kind != "none" else "")

    def wire(self, choice: WireChoice) -> WireFormat:
        """What the ranks send: see `decide_wire`. `auto` measures the link, once, unless CPU ranks share their memory.
        Collective; raises OutOfMemoryTogether."""
        if choice == "auto" and self._speed is None and self.kind not in ("none", "gloo"):
            self._speed = measure_link_speed(self._mesh, self._make_arena)
        self._wire = decide_wire(choice, self._speed)
        return self._wire

    @property
    def generation(self) -> int:
        """Changes when addresses that a CUDA graph holds have moved."""
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
        """Buffers and messages for tensors of one shape; packed: see `Wire`; width: values per token of the final
        gather. Collective."""
        mesh = self._mesh
        wire = Wire(heads // mesh.layout.ulysses, dim, dtype, packed)
        if self._arenas:
            exchange, ring = self._connect_peers(shards, batch, wire)
            gather = PeerGather(self._arenas[1], (batch, shards.local_image, width), dtype)
            return Links(exchange, ring, gather)
        if mesh.ulysses is None:
            received = (3, batch, shards.local, wire.heads, dim)
            exchange = LocalExchange(torch.empty(received, dtype=dtype, device=mesh.device))
        else:
            exchange = CollectiveExchange(mesh.ulysses, shards, batch, wire, mesh.device)
        ring = CollectiveRing(GroupExchange(mesh.ring), wire) if mesh.ring else None
        return Links(exchange, ring, GroupExchange(mesh.sequence) if mesh.sequence else None)

    def _connect_peers(self, shards: SequenceShards, batch: int, wire: Wire) -> tuple[UlyssesExchange, Ring | None]:
        mesh, u = self._mesh, self._mesh.layout.ulysses
        received = (3, batch, shards.gathered, wire.heads, wire.dim), wire.dtype
        arrivals = (3, u, batch, shards.local, *wire.row), wire.carrier
        returned = (u, batch, shards.local, *wire.row), wire.carrier
        block = (2, batch, shards.gathered, *wire.row), wire.carrier
        shapes = [received]
        if u > 1:
            shapes = [arrivals if wire.packed else received, returned]
        if wire.packed and mesh.ring:
            shapes.append(block)
        regions = carve(self._arenas[0], shapes)
        if u > 1:
            members = [mesh.ring_position * u + i for i in range(u)]
            exchange = PeerExchange(members, shards, wire, regions[0], regions[1], batch)
        else:
            exchange = LocalExchange(regions[0].own)
        if not mesh.ring:
            return exchange, None
        members = [r * u + mesh.ulysses_position for r in range(mesh.layout.ring)]
        block = Part(regions[-1]) if wire.packed else Part(regions[0], (slice(1, 3),))
        return exchange, PeerRing(members, wire, block)


def _choose(mesh: Mesh) -> Kind:
    if mesh.sequence is None:
        return "none"
    if mesh.device.type == "cpu":
        return "gloo"
    return ("nccl", "host memory", "symmetric memory")[_closeness(mesh)]


def _closeness(mesh: Mesh) -> int:
    """2 where every rank of a sequence can write to every other's memory, 1 where they share a host, else 0; the same
    on all of them. NCCL_P2P_DISABLE is respected."""
    host = zlib.crc32(socket.gethostname().encode())
    device, disabled = torch.cuda.current_device(), int(os.environ.get("NCCL_P2P_DISABLE", "0") == "1")
    mine = torch.tensor([host, device, disabled])
    members = mine.new_empty(mesh.layout.sequence_ranks, 3)
    all_gather_single(members.view(-1), mine, group=mesh.sequence)
    closeness = 2
    for other, peer, off in members.tolist():
        if other != host:
            closeness = 0
        elif off or not (peer == device or torch.cuda.can_device_access_peer(device, peer)):
            closeness = min(closeness, 1)
    verdict = torch.tensor([closeness])
    dist.all_reduce(verdict, dist.ReduceOp.MIN, group=mesh.sequence)  # access may be partial: all ranks choose alike
    return int(verdict)
