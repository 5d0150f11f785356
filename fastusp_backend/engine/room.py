"""How much room there is for weights, on all ranks alike, what becomes of them there, and the memory from which
streamed blocks come."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..comm.block_store import BlockStore, HostStore, PeerStore
from ..comm.groups import one_machine, world
from ..comm.pages import DevicePages, HostPages
from ..comm.transport import reach_each_other
from ..config import ModelSpec
from ..errors import RequestError
from ..host_memory import available
from ..models.family import FamilyConfig, Transformer
from ..models.files import unpacked_plans
from ..models.ownership import Ownership
from ..models.placement import Placement, place, smaller_weights
from ..weights.storage_plan import StoragePlan
from .denoiser import WORKING_SET

KEPT_FREE, LEAST_FREE = 2126 << 20, 1726 << 20
"""Bytes of a GPU for what is not counted: exchanges' buffers, graphs, libraries that warming.py leaves out. Where room
was short, FLUX.1 and FLUX.2 took 1.2 to 1.8 GB, measured on two H100 when all libraries were among it."""
LOADING_FREE = 800 << 20
"""The same while weights are read: less was taken between asking for room and that, on two H100."""
KEPT_TOKENS, LEAST_TOKENS = 9728, 4608
"""Images of 1536 x 1536 pixels, and 1024 x 1024, with 512 tokens of text: for an evaluation of so many there shall be
room."""
CONTEXT = (1050 + 74) << 20
"""Bytes of a GPU that a rank has taken when it asks how much is free: CUDA's context and NCCL, measured on two H100,
and 74 MiB by warming.py. One rank on an H200 had taken 60 to 160 MB more."""
LEAST_UNPACKED = 0.01
"""A smaller share of the weights is not unpacked: it would be told, and saves nothing."""
_UNKNOWN = 1 << 62


class Kept(NamedTuple):
    """Bytes of each GPU that weights leave for all else.

    usual: for larger images.
    least: what they leave where all blocks travel, before those come from the host, or are refused.
    """

    usual: int
    least: int


class Room(NamedTuple):
    """The least that any rank has.

    peers: whether the devices reach each other's memory; CPU ranks do.
    device_bytes: what is free of a GPU; None where weights need not count, on CPU ranks.
    host_bytes: what they may take of the host's memory; None where the system does not tell.
    """

    peers: bool
    device_bytes: int | None
    host_bytes: int | None = None


class Settled(NamedTuple):
    """plans: the forms of a model's weights. ownership: the ranks that have them. placement: where they lie."""

    plans: dict[str, StoragePlan]
    ownership: Ownership
    placement: Placement


def settle(model: Transformer, plans: dict[str, StoragePlan], spec: ModelSpec, ranks: int, room: Room) -> Settled:
    """Decides where the weights lie, and which are unpacked there. plans: their forms if none are. Raises as
    `placement.place`."""
    allowed = spec.unpack and spec.linear == "exact" and spec.weights in ("auto", "whole")
    if allowed and room.device_bytes is not None:
        if (found := _unpacked(model, plans, spec, ranks, room.device_bytes)) is not None:
            wide, share = found
            ownership = Ownership(model, wide, ranks)
            whole = place(model, wide, ownership, "whole", peers=room.peers)
            return Settled(wide, ownership, replace(whole, unpacked=share))
    ownership, available, spare = Ownership(model, plans, ranks), None, 0
    if room.device_bytes is not None:
        kept = kept_free(model.config, plans.values(), ranks)
        available, spare = room.device_bytes - kept.usual, kept.usual - kept.least
    found = place(model, plans, ownership, spec.weights, peers=room.peers, available=available, spare=spare)
    return Settled(plans, ownership, found)


def _unpacked(
    model: Transformer, plans: dict[str, StoragePlan], spec: ModelSpec, ranks: int, free: int
) -> tuple[dict[str, StoragePlan], float] | None:
    """The forms of weights that are unpacked, all or as many as there is room for on each device, and what share that
    is; None where it is hardly any."""
    every = unpacked_plans(model, plans, spec)
    if every == plans:
        return None
    kept, kept_packed = (kept_free(model.config, forms.values(), ranks).usual for forms in (every, plans))
    if max(Ownership(model, every, ranks).nbytes) <= free - kept:
        return every, 1.0
    # A mix of both forms takes no more beside itself than the one that takes more.
    room = free - max(kept, kept_packed) - max(Ownership(model, plans, ranks).nbytes)
    some = unpacked_plans(model, plans, spec, room)
    share = _widened(some) / _widened(every)
    return (some, share) if share >= LEAST_UNPACKED else None


def _widened(plans: dict[str, StoragePlan]) -> int:
    """Bytes that layers need not unpack in each step."""
    return sum(plan.small.unpacked_bytes for plan in plans.values() if plan.small is not None)


def kept_free(config: FamilyConfig, plans: Iterable[StoragePlan], ranks: int) -> Kept:
    """plans: the forms of the model's weights."""
    plans = list(plans)
    # Two prompts are evaluated side by side, each by half of the ranks.
    sharing = ranks if config.guidance or ranks % 2 else ranks // 2
    reading = max(plan.reading_bytes + (0 if plan.unchanged else plan.nbytes) for plan in plans)
    unpacked = 2 * max(plan.unpacked_bytes for plan in plans)  # measured: of the largest, as if two were there

    def kept(uncounted: int, tokens: int) -> int:
        evaluating = WORKING_SET * -(-tokens // sharing) * config.hidden * torch.bfloat16.itemsize
        return max(LOADING_FREE + reading, uncounted + evaluating + unpacked)

    return Kept(kept(KEPT_FREE, KEPT_TOKENS), kept(LEAST_FREE, LEAST_TOKENS))


def measure_room(device: torch.device) -> Room:
    """Asks all ranks. Collective: what others had is free when it returns."""
    _, ranks = world()
    cuda = device.type == "cuda"
    if ranks > 1:
        dist.all_reduce(torch.zeros(1))  # all have given back what they had
    on_device, on_host = _free(device) if cuda else _UNKNOWN, available()
    least = torch.tensor([on_device, _UNKNOWN if on_host is None else on_host])
    if ranks > 1:
        dist.all_reduce(least, dist.ReduceOp.MIN)
    device_bytes, host_bytes = (None if value == _UNKNOWN else value for value in least.tolist())
    return Room(ranks > 1 and (not cuda or reach_each_other(dist.group.WORLD)), device_bytes, host_bytes)


def _free(device: torch.device) -> int:
    """Bytes that this process can still allocate on a GPU."""
    free, total = torch.cuda.mem_get_info(device)
    # Older versions of torch cannot be asked for the limit that somebody has set.
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return min(free, int(share * total) - torch.cuda.memory_reserved(device))


def check_host_room(placement: Placement, plans: dict[str, StoragePlan], room: Room) -> None:
    """Raises RequestError where the host's memory does not take what is to lie there."""
    if room.host_bytes is not None and placement.host_bytes > room.host_bytes:
        raise RequestError(
            f"Free host memory, or {smaller_weights(placement, plans)}: the blocks that come from there "
            f"take {placement.host_bytes / 1e9:.1f} GB of it, {room.host_bytes / 1e9:.1f} GB are available"
        )


def make_store(placement: Placement, device: torch.device) -> BlockStore:
    """The memory from which a placement's blocks come, still to be allocated. Raises RequestError for ranks of several
    machines, which have no such memory in common."""
    if not one_machine():
        raise RequestError(
            "Set weights to whole in USP Optimization Settings, or use a smaller file or weight_dtype: the ranks are "
            "on several machines, and blocks that do not stay on a device cannot come from another machine"
        )
    parts, slots = [slab.parts for slab in placement.slabs], [slab.slot for slab in placement.slabs]
    if placement.source == "host":
        return HostStore(parts, slots, device)
    return PeerStore(parts, slots, DevicePages(device) if device.type == "cuda" else HostPages())
