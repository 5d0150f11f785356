"""Packed weights, of all formats: unpacked where they are used, by a kernel on GPUs, else by torch's operations."""

import torch

from ..kernels import gguf_blocks as gguf_kernel
from ..kernels import scaled_blocks as scaled_kernel
from ..kernels.tokens import available
from . import gguf_blocks, scaled_blocks
from .packing_type import Packing

PIECE = 1 << 24
"""Values that the CPU unpacks at a time: what is in between takes a few times 64 MB."""
PACKINGS: dict[str, Packing] = gguf_blocks.BLOCKS | scaled_blocks.BLOCKS
"""By name."""


def unpack(
    data: torch.Tensor,
    packing: str,
    dtype: torch.dtype,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """data (..., bytes) uint8 -> (..., values) in `dtype`, rounded once from float32.

    low_rank: up (rows, R) and down (R, values), whose product, computed in their type, is added to a matrix before
        that.
    scale: what the values of a matrix are multiplied by, () or (rows, 1) float32, where the format has it.
    """
    values, size, function, _ = PACKINGS[packing]
    rows = data.reshape(-1, data.shape[-1])
    out = torch.empty(len(rows), data.shape[-1] // size * values, dtype=dtype, device=data.device)
    if available(data.device):
        added = low_rank and low_rank[0] @ low_rank[1]
        if packing in gguf_blocks.BLOCKS:
            gguf_kernel.unpack(rows, packing, values, size, out, added)
        else:
            scaled_kernel.unpack(rows, packing, values, scale, out, added)
        return out.view(*data.shape[:-1], -1)
    count = max(1, PIECE // out.shape[1])
    for start in range(0, len(rows), count):
        piece = slice(start, start + count)
        blocks = rows[piece].unflatten(1, (-1, size))
        if scale is None:
            unpacked = function(blocks.flatten(0, 1))
        else:
            unpacked = function(blocks, scale[piece, :, None] if scale.dim() else scale)
        unpacked = unpacked.reshape(-1, out.shape[1])
        if low_rank is not None:
            up, down = low_rank
            unpacked += up[piece] @ down
        out[piece] = unpacked
    return out.view(*data.shape[:-1], -1)


def bytes_of(columns: slice, packing: str, width: int) -> slice | None:
    """Where the values of some columns lie in rows of `width` bytes; None where they do not begin and end at blocks."""
    values, size, *_ = PACKINGS[packing]
    start, stop, _ = columns.indices(width // size * values)
    return None if start % values or stop % values else slice(start // values * size, stop // values * size)
