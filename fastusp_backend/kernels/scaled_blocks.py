"""nvfp4, mxfp8 and int8, rotated or not, to 16 or 32 bits in one pass over them.

`weights/scaled_blocks.py` holds the formats and the reference: the same products in the same order, so that all bits
are equal. Rotated rows are products of integers with 1 and -1, exact in float16 with sums in float32; the matrix comes
from the numbers of its rows and columns.
"""

import torch

try:
    import triton
    import triton.language as tl

    from .widen import e4m3
except ImportError:  # a CPU build of torch brings no Triton
    triton = None

_ROWS, _COLUMNS = 4, 512
"""Values of a program."""
_TILE = 64
"""Rows and columns of a program where they are rotated."""


def unpack(
    packed: torch.Tensor,
    packing: str,
    values: int,
    scale: torch.Tensor | None,
    out: torch.Tensor,
    added: torch.Tensor | None = None,
) -> None:
    """packed (R, bytes) uint8, any row pitch, of a format whose blocks hold `values` values -> out (R, n), contiguous.
    scale: () or (R, 1) float32, any pitch; none for mxfp8. added (R, n): a float type, added in float32."""
    assert packed.stride(1) == 1 and out.is_contiguous()
    assert added is None or (added.is_contiguous() and added.shape == out.shape)
    assert (scale is None) == (packing == "mxfp8")
    kind, _, rotated = packing.partition("_")
    rows, columns = (_TILE, _TILE) if rotated else (_ROWS, _COLUMNS)
    _unpack_kernel[(triton.cdiv(out.shape[0], rows), triton.cdiv(out.shape[1], columns))](
        packed,
        out if scale is None else scale,
        out,
        out if added is None else added,
        out.shape[0],
        out.shape[1],
        packed.stride(0),
        scale.stride(0) if scale is not None and scale.dim() else 0,
        KIND=kind,
        GROUP=values if rotated else 0,
        ROOT=values**0.5,
        ADD=added is not None,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
        enable_fp_fusion=False,  # a fused multiply-add has other bits
    )


if triton is not None:

    @triton.jit
    def _rotated(packed, start, column, inside, columns, GROUP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
        """Sums over groups of a row's integers, which begin at packed (ROWS, 1), times the matrix's columns `column`
        (1, TILE), whose first is `start`: (ROWS, TILE) float32."""
        total = tl.zeros((ROWS, TILE), tl.float32)
        first = start // GROUP * GROUP if GROUP > TILE else start
        for step in range(0, GROUP if GROUP > TILE else TILE, TILE):
            k = first + step + tl.arange(0, TILE)
            code = tl.load(packed + k[None, :], mask=inside & (k[None, :] < columns), other=0).to(tl.int32)
            # Each two bits of row and column that add up to 3 turn the sign; of another group the upper ones differ.
            differ = k[:, None] ^ column
            threes = differ & (differ >> 1) & 0x55555555
            threes ^= threes >> 8
            threes ^= threes >> 4
            threes ^= threes >> 2
            sign = tl.where(differ < GROUP, 1 - 2 * (threes & 1), 0)
            total = tl.dot(((code ^ 128) - 128).to(tl.float16), sign.to(tl.float16), total)
        return total

    @triton.jit(do_not_specialize=["scale_pitch"])
    def _unpack_kernel(
        packed,
        scale,
        out,
        added,
        rows,
        columns,
        pitch,
        scale_pitch,
        KIND: tl.constexpr,
        GROUP: tl.constexpr,
        ROOT: tl.constexpr,
        ADD: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        start = tl.program_id(1) * COLUMNS
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = (row < rows) & (column < columns)
        begin = packed + row * pitch
        if KIND != "mxfp8":
            factor = tl.load(scale + row * scale_pitch, mask=row < rows, other=0.0)
        if KIND == "nvfp4":
            block = begin + column // 16 * 9
            of_block = e4m3(tl.load(block, mask=inside, other=0).to(tl.uint32))
            byte = tl.load(block + 1 + column % 16 // 2, mask=inside, other=0).to(tl.int32)
            code = (byte >> (4 - column % 2 * 4)) & 15
            exponent = (code & 7) >> 1
            halves = tl.where(exponent == 0, code & 1, (2 | (code & 1)) << tl.maximum(exponent - 1, 0))
            value = tl.where(code > 7, -halves, halves).to(tl.float32) * 0.5 * (factor * of_block)
        elif KIND == "mxfp8":
            block = begin + column // 32 * 33
            power = (tl.load(block, mask=inside, other=0).to(tl.uint32) << 23).to(tl.float32, bitcast=True)
            value = e4m3(tl.load(block + 1 + column % 32, mask=inside, other=0).to(tl.uint32)) * power
        else:
            tl.static_assert(KIND == "int8")
            if GROUP:
                value = _rotated(begin, start, column, row < rows, columns, GROUP, ROWS, COLUMNS) / ROOT
            else:
                code = tl.load(begin + column, mask=inside, other=0).to(tl.int32)
                value = ((code ^ 128) - 128).to(tl.float32)
            value *= factor
        place = row * columns + column
        if ADD:
            value += tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
