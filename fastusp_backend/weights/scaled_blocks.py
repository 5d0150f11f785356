"""The packed formats of ComfyUI's own quantised files: weights stay packed in memory. GPUs unpack them by a kernel, of
which this is the reference.

| format | values | scales |
|---|---|---|
| nvfp4 | 4 bits, e2m1, two in a byte, the first one in its upper half | e4m3 for each 16 of a row, float32 for all |
| mxfp8 | e4m3 | a power of two, e8m0, for each 32 of a row |
| int8 | integers | float32 for all, or for each row |
| int4, always rotated | integers, two in a byte, the first one in its lower half | float32 for each row |

In files the scales of nvfp4's and mxfp8's blocks lie apart, in cuBLAS' order
(docs.nvidia.com/cuda/cublas, 1D block scaling factors layout); in memory each begins its block, as in GGUF: so whatever
takes some rows or columns of a weight takes their scales along. The values, and the order of the products in float32,
are those of comfy-kitchen's dequantisation.

A row of integers may be rotated (ConvRot, arXiv 2512.03673): each group of 4^k values was multiplied by a Hadamard
matrix, the k-fold Kronecker product of the 4 x 4 one with -1 where row and column add up to 3. It is symmetric and,
divided by 2^k, its own inverse. Sums of such integers are exact in float32, in any order: the scale alone rounds.
"""

from functools import cache, partial

import torch

from .packing_type import Packing

GROUPS = (4, 16, 64, 256)
"""Values that are rotated together; ComfyUI's converters make 256."""
_TILE = 128, 4
"""Rows and columns of the tiles in which cuBLAS has scales, 32 rows and 16 bytes each: of a tile's rows the 32 quarters
lie side by side."""


def rotated(bits: int, group: int) -> str:
    """The name of the format of rows that are rotated in groups of so many values."""
    return f"int{bits}_convrot_{group}"


def count_of_scales(rows: int, blocks: int) -> int:
    """How many scales a file has for rows of so many blocks: whole tiles."""
    return -(-rows // _TILE[0]) * _TILE[0] * (-(-blocks // _TILE[1]) * _TILE[1])


def with_scales(data: torch.Tensor, scales: torch.Tensor, packing: Packing) -> torch.Tensor:
    """data (rows, bytes) uint8, scales (n,) uint8 as a file has them -> (rows, bytes) with each block's scale before
    it."""
    blocks = data.unflatten(1, (-1, packing.size - packing.apart))
    rows, count = blocks.shape[:2]
    tiles = scales.view(-(-rows // _TILE[0]), -1, 32, 4, 4)  # tile's row, its column, row % 32, row // 32, column
    in_rows = tiles.permute(0, 3, 2, 1, 4).reshape(-1, tiles.shape[1] * 4)
    return torch.cat([in_rows[:rows, :count, None], blocks], dim=2).flatten(1)


def _nvfp4(b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    codes = torch.stack([b[..., 1:] >> 4, b[..., 1:] & 15], dim=-1).flatten(-2)
    values = _e2m1(b.device)[codes.int()]
    return values * (scale * b[..., :1].contiguous().view(torch.float8_e4m3fn).float())


def _mxfp8(b: torch.Tensor) -> torch.Tensor:
    power = (b[:, :1].int() << 23).view(torch.float32)  # float32's own exponent; 0 gives 0, as in comfy-kitchen
    return b[:, 1:].contiguous().view(torch.float8_e4m3fn).float() * power


def _int8(b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return b.view(torch.int8).float() * scale


def _rotated(b: torch.Tensor, scale: torch.Tensor, *, bits: int, group: int) -> torch.Tensor:
    if bits == 4:
        b = (torch.stack([b & 15, b >> 4], dim=-1).flatten(-2) ^ 8) - 8
    return b.view(torch.int8).float() @ hadamard(group, b.device) * group**-0.5 * scale


@cache
def _e2m1(device: torch.device) -> torch.Tensor:
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=device)
    return torch.cat([values, -values])


@cache
def hadamard(size: int, device: torch.device) -> torch.Tensor:
    """The matrix of a rotation, of 1 and -1, (size, size) float32."""
    matrix, four = torch.ones(1, 1, device=device), 1 - 2 * torch.eye(4, device=device).flip(0)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix


BLOCKS = {
    "nvfp4": Packing(16, 9, _nvfp4, apart=1),
    "mxfp8": Packing(32, 33, _mxfp8, apart=1),
    "int8": Packing(1, 1, _int8),
    **{
        rotated(bits, group): Packing(group, group * bits // 8, partial(_rotated, bits=bits, group=group))
        for bits in (4, 8)
        for group in GROUPS
    },
}
"""By the names of ComfyUI's formats."""
