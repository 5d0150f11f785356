"""How the ranks of a mesh move tensors, chosen once: symmetric memory where GPUs map each other's memory, host memory
where they share a host alone, else the process group's own collectives (NCCL on GPUs, gloo on CPU ranks)."""

import os
import socket
import zlib
from typing import Literal

import torch
import torch.distributed as dist

from ..config import WireChoice
from .arena import Arena, carve
from .collective import CollectiveExchange, CollectiveRing, GroupExchange
from .groups import all_gather_single, allocate_together
from .links import Links, LocalExchange, Ring, UlyssesExchange
from .mesh import Mesh
from .peers import PeerExchange, PeerGather, PeerRing
from .shards import SequenceShards
from .staged import StagedArena
from .symmetric import SymmetricArena
from .wire import Wire

Kind = Literal["none", "symmetric memory", "host memory", "nccl", "gloo"]

Sent = Literal["exact", "fp8", "int8"]
PACKED: dict[Sent, torch.dtype | None] = {"exact": None, "fp8": torch.uint8, "int8": torch.int8}
"""What carries each: see kernels/eight_bits.py."""

FAST_LINK = 100.0
"""GB/s from which `auto` sends exact values. FLUX.1-dev's 1.6 GB a step on 2 GPUs hide behind 60 ms of computing from
27 GB/s on where all of it overlaps; what does not, and other ranks on the same link, take several times that."""
_PROBE_BYTES = 32 << 20


class Transport:
    """Makes the links of one mesh; `kind` says how they move. Made on all ranks together. kind: for measurements, to
    have another than the one chosen."""

    def __init__(self, mesh: Mesh, kind: Kind | None = None):
        self._mesh = mesh
        self.kind: Kind = kind or _choose(mesh)
        make = {"symmetric memory": SymmetricArena, "host memory": StagedArena}.get(self.kind)
        # The gather's memory must not be another message's in a step of another shape: see peers.py.
        self._arenas: list[Arena] = [make(mesh.sequence, mesh.device) for _ in range(2)] if make else []
        self._speed: float | None = None
        self._wire: Sent | None = None

    def __str__(self) -> str:
        """For people: how tensors move, and what the last wire asked for was."""
        speed = f" ({self._speed:.0f} GB/s)" if self._speed is not None else ""
        return f"{self.kind}{speed}" + (f", {self._wire} wire" if self._wire and self.kind != "none" else "")

    def wire(self, choice: WireChoice) -> Sent:
        """What the ranks send. `auto` measures the link once: int8 where it is slower than FAST_LINK. CPU ranks share
        their memory, so they send exact values then. Collective; raises OutOfMemoryTogether."""
        if choice == "auto":
            if self.kind not in ("none", "gloo") and self._speed is None:
                self._speed = self._measure()
            choice = "int8" if self._speed is not None and self._speed < FAST_LINK else "exact"
        self._wire = choice
        return choice

    def _measure(self) -> float:
        """GB/s at which every rank sends to the next one at once; the slowest rank's."""
        mesh = self._mesh
        # Two: what a rank sends, and where it receives, unless that is an arena's.
        payload, _ = allocate_together(
            lambda: [torch.empty(_PROBE_BYTES, dtype=torch.uint8, device=mesh.device) for _ in range(2)], mesh.sequence
        )
        if self._arenas:
            arena = type(self._arenas[0])(mesh.sequence, mesh.device)
            (region,) = allocate_together(lambda: carve(arena, [((_PROBE_BYTES,), torch.uint8)]), mesh.sequence)
            target = region.of((arena.rank + 1) % arena.size)
        else:
            target, ring = None, GroupExchange(mesh.sequence)

        def send() -> None:
            if target is None:
                ring.shift(payload)()
            else:
                target.copy_(payload, non_blocking=True)

        send()
        torch.cuda.synchronize()
        dist.all_reduce(torch.zeros(1), group=mesh.sequence)  # all begin together
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(4):
            send()
        stop.record()
        torch.cuda.synchronize()
        speed = torch.tensor([4 * _PROBE_BYTES / start.elapsed_time(stop) / 1e6])
        dist.all_reduce(speed, dist.ReduceOp.MIN, group=mesh.sequence)
        return float(speed)

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
        row, column = mesh.rank // u, mesh.rank % u
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
            ranks = [row * u + i for i in range(u)]
            exchange = PeerExchange(ranks, shards, wire, regions[0], regions[1], batch)
        else:
            exchange = LocalExchange(regions[0].own)
        if not mesh.ring:
            return exchange, None
        ranks = [r * u + column for r in range(mesh.layout.ring)]
        ring = PeerRing(ranks, wire, regions[-1]) if wire.packed else PeerRing(ranks, wire, regions[0], (slice(1, 3),))
        return exchange, ring


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
