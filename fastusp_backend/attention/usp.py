"""Unified sequence parallelism (Ulysses x ring, arXiv 2405.07719) as one attention call.

Ulysses trades tokens for heads: before attention an all-to-all gives each rank of a Ulysses group all of the group's
tokens for its own heads, after it another gives the tokens back. The ring then passes keys and values round, so that
every token sees all others; the partial results are merged by their LSE (arXiv 2310.01889).
"""

import torch

from ..comm.exchange import CollectiveExchange, Exchange
from ..comm.mesh import Mesh
from ..comm.shards import SequenceShards, select_runs
from .local import Attend, merge


class USPAttention:
    """Attention over the whole sequence for the tokens of one rank.

    Called with q, k, v (B, L, H, D), where L is the rank's [text, image] tokens and H all heads; returns (B, L, H, D).
    """

    def __init__(self, mesh: Mesh, attend: Attend):
        self._mesh = mesh
        self._attend = attend
        self._ulysses: Exchange | None = CollectiveExchange(mesh.ulysses) if mesh.ulysses else None
        self._ring: Exchange | None = CollectiveExchange(mesh.ring) if mesh.ring else None

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shards: SequenceShards) -> torch.Tensor:
        scale = q.shape[-1] ** -0.5
        if self._ulysses is None:
            return self._over_ring(q, k, v, shards, scale)
        q, k, v = self._to_heads(q, k, v)
        return self._to_tokens(self._over_ring(q, k, v, shards, scale))

    def _to_heads(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """n tensors (B, L, H, D) -> n tensors (B, U L, H / U, D), in one exchange."""
        u = self._mesh.layout.ulysses
        x = torch.stack(tensors)
        n, b, length, heads, d = x.shape
        x = x.reshape(n, b, length, u, heads // u, d).permute(3, 0, 1, 2, 4, 5)
        received = self._ulysses.all_to_all(x)()  # (U, n, B, L, H / U, D)
        return received.permute(1, 2, 0, 3, 4, 5).reshape(n, b, u * length, heads // u, d).unbind(0)

    def _to_tokens(self, out: torch.Tensor) -> torch.Tensor:
        """(B, U L, H / U, D) -> (B, L, H, D)."""
        u = self._mesh.layout.ulysses
        b, length, heads, d = out.shape
        x = out.reshape(b, u, length // u, heads, d).transpose(0, 1)
        received = self._ulysses.all_to_all(x)()  # (U, B, L, H / U, D): chunk p holds rank p's heads
        return received.permute(1, 2, 0, 3, 4).reshape(b, length // u, u * heads, d)

    def _over_ring(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shards: SequenceShards, scale: float
    ) -> torch.Tensor:
        position, size = self._mesh.ring_position, self._mesh.layout.ring
        if size == 1:
            runs = shards.valid_runs(0)
            return self._attend(q, select_runs(k, runs, dim=1), select_runs(v, runs, dim=1), scale)[0]

        block = torch.stack((k, v))
        merged: tuple[torch.Tensor, torch.Tensor] | None = None
        for hop in range(size):
            arriving = self._ring.shift(block) if hop < size - 1 else None
            # After `hop` shifts this rank holds the block of the rank `hop` places before it.
            runs = shards.valid_runs((position - hop) % size)
            if runs:
                part = self._attend(q, *select_runs(block, runs, dim=2).unbind(0), scale)
                merged = part if merged is None else merge(*merged, *part)
            if arriving:
                block = arriving()
        return merged[0].to(q.dtype)
