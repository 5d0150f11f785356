"""Ranks arranged as batch x ring x ulysses, and the process groups of each axis: the one place that makes groups."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..config import Layout
from ..ports import close_ports
from .groups import GROUP_TIMEOUT


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """This rank's place in a layout. A group is None where its axis has one rank: nothing is sent then.

    rank counts within the ranks that share a sequence; sequence is their group, in that order. batch is the group of
    the ranks at the same place in all batch groups.
    """

    layout: Layout
    rank: int
    device: torch.device
    batch_position: int = 0
    batch: dist.ProcessGroup | None = None
    sequence: dist.ProcessGroup | None = None
    ulysses: dist.ProcessGroup | None = None
    ring: dist.ProcessGroup | None = None

    @property
    def ring_position(self) -> int:
        return self.rank // self.layout.ulysses


def single_rank_mesh(device: torch.device) -> Mesh:
    """A mesh of one rank; needs no process group."""
    return Mesh(layout=Layout(ulysses=1, ring=1), rank=0, device=device)


def make_mesh(layout: Layout, device: torch.device) -> Mesh:
    """Builds the groups of `layout` over the default process group. Collective: every rank calls it with the same
    layout."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if layout.ranks != ranks:
        raise ValueError(f"layout {layout} needs {layout.ranks} ranks, the pool has {ranks}")
    u, r, n = layout.ulysses, layout.ring, layout.sequence_ranks
    groups = [list(range(g * n, (g + 1) * n)) for g in range(layout.batch)]
    rows = [group[j * u : (j + 1) * u] for group in groups for j in range(r)]
    columns = [group[i::u] for group in groups for i in range(u)]
    across = [[group[i] for group in groups] for i in range(n)]
    mesh = Mesh(
        layout=layout,
        rank=rank % n,
        device=device,
        batch_position=rank // n,
        batch=_own_group(across, rank) if layout.batch > 1 else None,
        sequence=_own_group(groups, rank) if n > 1 else None,
        ulysses=_own_group(rows, rank) if u > 1 else None,
        ring=_own_group(columns, rank) if r > 1 else None,
    )
    close_ports()
    return mesh


def _own_group(partition: list[list[int]], rank: int) -> dist.ProcessGroup:
    """Makes every group of the partition (all ranks must) and returns the one that holds `rank`."""
    groups = [(members, dist.new_group(members, timeout=GROUP_TIMEOUT)) for members in partition]
    return next(group for members, group in groups if rank in members)
