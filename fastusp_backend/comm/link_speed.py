"""How fast the ranks of a sequence send to each other, measured on the link that their exchanges will take, the slower
of two.

No table of GPUs, lanes and switches would say it: what counts is all ranks sending at once, over whatever lies between
them. Each sends 160 MiB, once per layout, and only where `wire = auto` asks for it (see wire.py).
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from .arena import Arena, carve
from .collective import GroupExchange
from .groups import all_ranks, allocate_together
from .mesh import Mesh

PROBE_BYTES = 32 << 20
_ROUNDS = 4


def measure_link_speed(
    mesh: Mesh,
    group: dist.ProcessGroup,
    make_arena: Callable[[dist.ProcessGroup, torch.device], Arena] | None = None,
) -> float:
    """Returns the GB/s at which every rank sends at once to the next one of its group; the slowest rank's, on all of
    them: batch groups whose links differ must choose one wire, of which the size of their memory depends.

    group: the sequence's, or this rank's ring.
    make_arena: makes the memory through which peers are written to; without it the group's collectives send.

    Collective over all ranks; raises OutOfMemoryTogether.
    """
    everyone = all_ranks()
    # Two: what a rank sends, and where it receives, unless that is an arena's.
    payload, _ = allocate_together(
        lambda: [torch.empty(PROBE_BYTES, dtype=torch.uint8, device=mesh.device) for _ in range(2)], everyone
    )
    if make_arena:
        arena = make_arena(group, mesh.device)
        (region,) = allocate_together(lambda: carve(arena, [((PROBE_BYTES,), torch.uint8)]), everyone)
        target = region.of((arena.position + 1) % arena.size)
    else:
        target, ring = None, GroupExchange(group)

    def send() -> None:
        if target is None:
            ring.shift(payload)()
        else:
            target.copy_(payload, non_blocking=True)

    send()
    torch.cuda.synchronize()
    dist.all_reduce(torch.zeros(1), group=everyone)  # all begin together
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_ROUNDS):
        send()
    stop.record()
    torch.cuda.synchronize()
    speed = torch.tensor([_ROUNDS * PROBE_BYTES / start.elapsed_time(stop) / 1e6])
    dist.all_reduce(speed, dist.ReduceOp.MIN, group=everyone)
    return float(speed)
