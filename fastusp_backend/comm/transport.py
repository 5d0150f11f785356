"""Which exchange a mesh uses, chosen once: symmetric memory where GPUs map each other's memory, else the process
group's own collectives (NCCL on GPUs, gloo on CPU ranks)."""

import os
import socket
import zlib

import torch
import torch.distributed as dist

from .exchange import all_gather_single
from .mesh import Mesh
from .shards import SequenceShards
from .symmetric import Arena, SymmetricExchange
from .ulysses import CollectiveExchange, LocalExchange, UlyssesExchange


class Transport:
    """Makes the Ulysses exchanges of one mesh; `name` says how they move. Made on all ranks together."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self.arena: Arena | None = None
        if mesh.ulysses is None:
            self.name = "none"
        elif mesh.device.type == "cpu":
            self.name = "gloo"
        elif _all_are_peers(mesh):
            self.name = "symmetric memory"
            self.arena = Arena(mesh.ulysses, mesh.device)
        else:
            self.name = "nccl"

    @property
    def generation(self) -> int:
        """Changes when addresses that a CUDA graph holds have moved."""
        return self.arena.generation if self.arena else 0

    def exchange(self, shards: SequenceShards, batch: int, heads: int, dim: int, dtype: torch.dtype) -> UlyssesExchange:
        """Buffers and messages for tensors of one shape. Collective."""
        if self.arena is not None:
            return SymmetricExchange(self.arena, shards, batch, heads, dim, dtype)
        like = torch.empty(0, dtype=dtype, device=self._mesh.device)
        if self._mesh.ulysses is None:
            return LocalExchange(shards, batch, heads, dim, like)
        return CollectiveExchange(self._mesh.ulysses, shards, batch, heads, dim, like)


def _all_are_peers(mesh: Mesh) -> bool:
    """Whether every rank of the Ulysses group can write to every other's memory; NCCL_P2P_DISABLE is respected."""
    host = zlib.crc32(socket.gethostname().encode())
    device, disabled = torch.cuda.current_device(), int(os.environ.get("NCCL_P2P_DISABLE", "0") == "1")
    mine = torch.tensor([host, device, disabled], device=mesh.device)
    members = mine.new_empty(mesh.layout.ulysses, 3)
    all_gather_single(members.view(-1), mine, group=mesh.ulysses)
    reachable = all(
        other == host and not off and (peer == device or torch.cuda.can_device_access_peer(device, peer))
        for other, peer, off in members.tolist()
    )
    verdict = torch.tensor([int(reachable)], device=mesh.device)
    dist.all_reduce(verdict, dist.ReduceOp.MIN, group=mesh.ulysses)  # access may be partial: all ranks choose alike
    return bool(verdict)
