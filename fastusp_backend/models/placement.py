"""Which blocks' weights stay on a device, and which are streamed to it in every step: decided once, from sizes alone.

A streamed block comes into a slot while other blocks compute: out of the host's memory (`host`), or of other
GPUs' (`shared`), each of which owns an equal part of it. Blocks, not layers, take turns: a block's computing is what
another's journey hides behind. As few as need be, since each costs a journey a step; spread evenly between those that
stay, so that a journey has their time too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from ..config import ModelSpec, WeightsChoice
from ..errors import RequestError
from ..weights.storage_plan import StoragePlan
from ..weights.tensor_info import TensorInfo
from .family import Transformer
from .files import model_and_plans
from .ownership import Ownership

Source = Literal["shared", "host"]

PAGE = 2 << 20
"""Bytes, of which blocks are cut in whole numbers: the least that a GPU maps."""
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Slab:
    """A streamed block's weights, one behind the other in one piece, which is cut into a part of each rank.

    block: its number among the model's blocks.
    slot: the number of the slot that it comes to.
    parts: bytes of each rank's part.
    offsets: where each weight's data and scale lie in the piece, in bytes, by its name.
    owners: the rank that reads and changes each weight: the one that has most of it.
    """

    block: int
    slot: int
    parts: tuple[int, ...]
    offsets: dict[str, tuple[int, int]]
    owners: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the weights of a model lie.

    source: where streamed blocks come from, None where all stay.
    slabs: the streamed blocks, in the order in which they are evaluated.
    beside_tokens: whether they come by the same links, and copy engines, as the tokens that ranks exchange.
    blocks: how many blocks the model has.
    device_bytes: what the weights take of a device: those that stay, slots, and of shared blocks its own.
    streamed_bytes: what comes to a device in a step.
    host_bytes: what they take of the host's memory.
    unpacked: of the weights that layers would convert at each use, the share that lies there as they compute with it.
    """

    source: Source | None
    slabs: tuple[Slab, ...]
    blocks: int
    device_bytes: int
    beside_tokens: bool = False
    streamed_bytes: int = 0
    host_bytes: int = 0
    unpacked: float = 0.0

    def __str__(self) -> str:
        """Says, for people, where the weights are."""
        size = f"{size_in_words(self.device_bytes)} a device"
        if not self.slabs:
            part = "" if self.unpacked == 1 else f"{min(99, round(100 * self.unpacked))} % of the weights "
            return f"whole, {part + 'unpacked, ' if self.unpacked else ''}{size}"
        stay = self.blocks - len(self.slabs)
        where = "shared" if self.source == "shared" else "come from host memory"
        return f"{stay} of {self.blocks} blocks stay, {len(self.slabs)} {where}: {size}"


def size_in_words(nbytes: int) -> str:
    """GB; what would be hardly any, in MB."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.0f} MB"


def place(
    model: Transformer,
    plans: dict[str, StoragePlan],
    ownership: Ownership,
    choice: WeightsChoice,
    *,
    peers: bool,
    available: int | None = None,
    spare: int = 0,
) -> Placement:
    """Chooses the blocks that are streamed.

    peers: whether the devices reach each other's memory.
    available: bytes of each device that the weights may take; None for any number. `shared` and `host` stream every
        block, whatever there is.
    spare: bytes that they may take more where all blocks travel, before they come from the host or are refused: that
        costs larger images, and a step from the host several times as long. Few blocks from there cost little.

    Raises RequestError for `shared` weights on devices that do not reach each other, and where even all blocks streamed
    leave more than there is.
    """
    ranks = len(ownership.nbytes)
    if choice == "shared" and not (peers and ranks > 1):
        why = "they do not reach each other's memory" if ranks > 1 else "there is only one"
        raise RequestError(f"Set weights to host or auto: the GPUs cannot share them, since {why}")
    blocks = len(model.blocks())
    if choice == "whole" or choice == "auto" and (available is None or max(ownership.nbytes) <= available):
        return Placement(source=None, slabs=(), blocks=blocks, device_bytes=max(ownership.nbytes))
    weights = _weights_of_blocks(model, plans)
    if choice != "auto":
        return _stream(weights, plans, ownership, choice, blocks, peers)
    sizes = [sum(plans[name].nbytes for name in names) for names in weights]
    sources: tuple[Source, ...] = ("shared", "host") if peers and ranks > 1 else ("host",)
    for source in sources:
        leaves = 1 - 1 / ranks if source == "shared" else 1  # a device, of what is streamed, less the slots
        for count in range(1, blocks + 1):
            most = leaves * sum(sizes[number] for number in _spread(count, blocks))
            if max(ownership.nbytes) - most > available and count < blocks:
                continue
            found = _stream(weights, plans, ownership, source, count, peers)
            if found.device_bytes <= available + (spare if count == blocks else 0):
                return found
    missing = max(0.1, (found.device_bytes - available - spare) / 1e9)
    raise RequestError(
        f"Free memory of the GPUs (Unload Models, other programs), or {smaller_weights(found, plans)}: even with all "
        f"blocks in host memory the weights take {found.device_bytes / 1e9:.1f} GB of each GPU, {missing:.1f} GB more "
        "than are left for them"
    )


def smaller_weights(placement: Placement, plans: dict[str, StoragePlan]) -> str:
    """What makes the weights smaller of blocks that travel, for a refusal."""
    wide = any(plans[name].dtype.itemsize > 1 for slab in placement.slabs for name in slab.offsets)
    return "use " + "linear = fp8 (GPUs from RTX 40 and H100 on) or " * wide + "a smaller file or weight_dtype"


def place_file(
    header: dict[str, TensorInfo], spec: ModelSpec, ranks: int, *, peers: bool = True, **room: int | None
) -> Placement:
    """Says where a file's weights will lie on so many ranks. header: the tensors that the model needs, as
    `files.read_model` gives them. Otherwise as `place`."""
    model, plans = model_and_plans(header, spec)
    return place(model, plans, Ownership(model, plans, ranks), spec.weights, peers=peers, **room)


def stream_count(
    model: Transformer,
    plans: dict[str, StoragePlan],
    ownership: Ownership,
    source: Source,
    count: int,
    *,
    peers: bool = True,
) -> Placement:
    """Streams so many blocks, evenly spread. peers: as in `place`."""
    return _stream(_weights_of_blocks(model, plans), plans, ownership, source, count, peers)


def _stream(
    weights: list[list[str]],
    plans: dict[str, StoragePlan],
    ownership: Ownership,
    source: Source,
    count: int,
    peers: bool,
) -> Placement:
    """weights: names, block by block."""
    ranks = len(ownership.nbytes)
    owned = [0] * ranks
    slabs = []
    for i, block in enumerate(_spread(count, len(weights))):
        # The last block fetches the first: of an odd number, into a slot that is not its own.
        slot = 2 if i == count - 1 and i and i % 2 == 0 else i % 2
        slabs.append(_slab(block, slot, weights[block], plans, owned))
    streamed = sum(plans[name].nbytes for slab in slabs for name in slab.offsets)
    if source == "host":
        slots, come = [sum(most) for most in _largest(slabs)], sum(owned)
    else:  # on the rank to which most comes
        slots = [sum(most) - min(most) for most in _largest(slabs)]
        come = sum(owned) - min(owned)
    return Placement(
        source=source,
        slabs=tuple(slabs),
        beside_tokens=ranks > 1 and (source == "shared" or not peers),
        blocks=len(weights),
        device_bytes=max(ownership.nbytes) - streamed + sum(slots) + (max(owned) if source == "shared" else 0),
        streamed_bytes=come,
        host_bytes=max(owned) * ranks if source == "host" else 0,
    )


def _spread(count: int, blocks: int) -> list[int]:
    """The numbers of so many blocks, evenly spread."""
    return [i * blocks // count for i in range(count)]


def _largest(slabs: list[Slab]) -> list[list[int]]:
    """For each slot the bytes of each rank's largest part."""
    return [
        [max(sizes) for sizes in zip(*(slab.parts for slab in slabs if slab.slot == slot), strict=True)]
        for slot in sorted({slab.slot for slab in slabs})
    ]


def _weights_of_blocks(model: Transformer, plans: dict[str, StoragePlan]) -> list[list[str]]:
    """The names of each block's layers' weights, less those of modulations, which are no part of a step; biases, norms
    and scales are small and stay."""
    apart = {id(layer) for layer in model.modulations()}
    numbers = {id(block): number for number, block in enumerate(model.blocks())}
    names: list[list[str]] = [[] for _ in numbers]
    for prefix, block in model.named_modules():
        if (number := numbers.get(id(block))) is None:
            continue
        for inner, layer in block.named_modules():
            name = f"{prefix}.{inner}.weight"
            if name in plans and plans[name].linear and id(layer) not in apart:
                names[number].append(name)
    return names


def _slab(block: int, slot: int, names: Iterable[str], plans: dict[str, StoragePlan], owned: list[int]) -> Slab:
    """owned: bytes of each rank, to which this adds."""
    offsets, end = {}, 0
    for name in names:
        plan = plans[name]
        behind = end + _aligned(plan.data_bytes)
        offsets[name] = end, behind
        end = behind + _aligned(plan.nbytes - plan.data_bytes)
    pages, ranks = -(-end // PAGE), len(owned)
    fewest = sorted(range(ranks), key=lambda rank: (owned[rank], rank))[: pages % ranks]  # they take one more
    parts = [(pages // ranks + (rank in fewest)) * PAGE for rank in range(ranks)]
    for rank, size in enumerate(parts):
        owned[rank] += size
    ends = list(accumulate(parts))
    return Slab(
        block=block,
        slot=slot,
        parts=tuple(parts),
        offsets=offsets,
        owners={name: _owner(start, start + plans[name].nbytes, ends) for name, (start, _) in offsets.items()},
    )


def _owner(start: int, stop: int, ends: list[int]) -> int:
    """The rank that has most of some bytes. ends: where the ranks' parts end."""
    starts = [0, *ends[:-1]]
    return max(range(len(ends)), key=lambda rank: min(stop, ends[rank]) - max(start, starts[rank]))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
