"""What a row of attention heads looks like while it travels: as computed, or packed in 8 bits (kernels/eight_bits.py).

`decide_wire` is the one place that decides which of them ranks send, by the option `wire` and the link's speed.

A packed row carries a scale per (token, head) beside its codes: about half of bf16's bytes, in one message that is cut,
sent and skipped as exact rows are. One scale per tensor would save those bytes of scales, but needs a pass over all
tokens before the first is sent, and one large value would coarsen all others. A rank's own tokens are never packed. At
the same bytes integers have a quarter of e4m3's error on plain values, so `auto` takes them; e4m3 keeps more where one
value of a head is far above the others.

attention/__init__.py lists the letters of the shapes.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from ..config import WireChoice
from ..kernels import eight_bits
from ..kernels.unpack import Destination, Own, unpack
from .shards import SequenceShards

WireFormat = Literal["exact", "fp8", "int8"]
PACKED: dict[WireFormat, torch.dtype | None] = {"exact": None, "fp8": torch.uint8, "int8": torch.int8}
"""The type that carries each format: see kernels/eight_bits.py."""

FAST_LINK = 100.0
"""GB/s from which `auto` sends exact values. FLUX.1-dev's 1.6 GB a step on 2 GPUs hide behind 60 ms of computing from
27 GB/s on where all of it overlaps; what does not, and other ranks on the same link, take several times that."""


def decide_wire(choice: WireChoice, link_speed: float | None) -> WireFormat:
    """Returns the format that the ranks send. `auto` is int8 on links slower than FAST_LINK, else exact.

    link_speed: GB/s; None between CPU ranks, which share their memory, and on one rank alone.
    """
    if choice != "auto":
        return choice
    return "int8" if link_speed is not None and link_speed < FAST_LINK else "exact"


@dataclass(frozen=True, slots=True)
class Wire:
    """The rows of tensors of one type, and how they are packed for the wire.

    heads: heads in a row, h.
    dim: values of a head, D.
    dtype: the type of the values, before and after.
    packed: the type that carries rows in 8 bits, None where values travel as they are.
    """

    heads: int
    dim: int
    dtype: torch.dtype
    packed: torch.dtype | None = None

    @property
    def row(self) -> tuple[int, ...]:
        """The shape of a token's row on the wire."""
        return (eight_bits.pitch(self.heads, self.dim),) if self.packed else (self.heads, self.dim)

    @property
    def carrier(self) -> torch.dtype:
        """The type of what travels."""
        return self.packed or self.dtype

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x (B, R, h, D) as rows (B, R, *row)."""
        if not self.packed:
            return x
        rows = torch.empty(*x.shape[:2], *self.row, dtype=self.packed, device=x.device)
        eight_bits.pack(x, rows)
        return rows

    def decode_ring(self, block: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Returns a block (2, B, N, *row) as keys and values (2, B, N, h, D), in `out` where they were packed."""
        if not self.packed:
            return block
        unpack(block[:, None], out, Destination(block.shape[2], 0, block.shape[2], 0))
        return out


def unpack_gathered(
    packed: torch.Tensor, received: torch.Tensor, shards: SequenceShards, position: int, *, text: bool, image: bool
) -> None:
    """Unpacks packed (T, U, B, R, pitch), text rows, image rows or both of all Ulysses positions, into received
    (T, B, N, h, D), but for those of this rank's own `position`."""
    u, t, i = shards.layout.ulysses, shards.local_text, shards.local_image
    start = u * t
    unpack(packed, received, Destination(t if text else 0, t, start, i, skipped=position))


def unpack_returned(
    packed: torch.Tensor, attended: torch.Tensor, shards: SequenceShards, position: int
) -> torch.Tensor:
    """Returns this rank's attended tokens (B, L, H D), from packed (U, B, L, pitch), by the Ulysses position that
    computed them, and from what it attended itself, (B, N, h, D), which is taken unpacked."""
    heads, dim = attended.shape[2:]
    t = shards.local_text
    out = attended.new_empty(packed.shape[1], shards.local, packed.shape[0] * heads, dim)
    to = Destination(t, 0, t, 0, head_step=heads, skipped=position)
    (_, text), (_, image) = shards.regions(position)
    unpack(packed[None], out[None], to, Own(attended.contiguous(), text.start, image.start))
    return out.flatten(2)
