"""Ranks arranged as batch x ring x ulysses, and the process groups of each axis: the one place that makes groups.

The names, wherever ranks are spoken of:

A *rank* is one process, and its number among all ranks of the pool (torch's global rank). Its number along an axis is
its *position* there, from 0 on. An axis' *group* is the ranks that differ in that position alone, in its order: so a
position is the rank in that process group, as torch counts.

| axis | what its ranks do | size | position |
|---|---|---|---|
| ulysses | trade tokens for heads around attention | layout.ulysses | ulysses_position |
| ring | pass keys and values round | layout.ring | ring_position |
| sequence | share one sequence: ring x ulysses | layout.sequence_ranks | sequence_position |
| batch | evaluate other prompts or images | layout.batch | batch_position |

Ulysses counts fastest and batch slowest, so that a Ulysses group is made of neighbours:

    sequence_position = ring_position * layout.ulysses + ulysses_position
    rank = batch_position * layout.sequence_ranks + sequence_position

What options and messages call a "batch group" is the ranks of one sequence, not a group of the batch axis.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..config import Layout
from ..ports import close_ports
from .groups import GROUP_TIMEOUT


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """This rank's place in a layout, and its group along each axis: None where an axis has one rank, which sends
    nothing."""

    layout: Layout
    device: torch.device
    sequence_position: int = 0
    batch_position: int = 0
    batch: dist.ProcessGroup | None = None
    sequence: dist.ProcessGroup | None = None
    ulysses: dist.ProcessGroup | None = None
    ring: dist.ProcessGroup | None = None

    @property
    def ulysses_position(self) -> int:
        return self.sequence_position % self.layout.ulysses

    @property
    def ring_position(self) -> int:
        return self.sequence_position // self.layout.ulysses


def single_rank_mesh(device: torch.device) -> Mesh:
    """Returns a mesh of one rank, which needs no process group."""
    return Mesh(layout=Layout(ulysses=1, ring=1), device=device)


def make_mesh(layout: Layout, device: torch.device) -> Mesh:
    """Builds the groups of `layout` over the default process group. Collective: every rank calls it with the same
    layout."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if layout.ranks != ranks:
        raise ValueError(f"layout {layout} needs {layout.ranks} ranks, the pool has {ranks}")
    u, r, n = layout.ulysses, layout.ring, layout.sequence_ranks
    sequences = [list(range(g * n, (g + 1) * n)) for g in range(layout.batch)]
    ulysses = [members[j * u : (j + 1) * u] for members in sequences for j in range(r)]
    rings = [members[i::u] for members in sequences for i in range(u)]
    batches = [[members[i] for members in sequences] for i in range(n)]
    mesh = Mesh(
        layout=layout,
        device=device,
        sequence_position=rank % n,
        batch_position=rank // n,
        batch=_own_group(batches, rank) if layout.batch > 1 else None,
        sequence=_own_group(sequences, rank) if n > 1 else None,
        ulysses=_own_group(ulysses, rank) if u > 1 else None,
        ring=_own_group(rings, rank) if r > 1 else None,
    )
    close_ports()
    return mesh


def _own_group(partition: list[list[int]], rank: int) -> dist.ProcessGroup:
    """Makes every group of the partition (all ranks must) and returns the one that `rank` is a member of."""
    groups = [(members, dist.new_group(members, timeout=GROUP_TIMEOUT)) for members in partition]
    return next(group for members, group in groups if rank in members)
