"""nvfp4, mxfp8, int8, and int8 and int4 that is rotated, to 16 or 32 bits in one pass over them.

`weights/scaled_blocks.py` holds the formats and the reference: the same products in the same order, so that all bits
are equal. Rotated rows are products of integers with a matrix of 1 and -1, exact in float16 with sums in float32; those
of a group of 256 four products with the matrix of 64, whose sums are the rest of it.
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
"""Rows of a program where they are rotated, and columns of one product."""


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
    assert packed.dtype == torch.uint8 and packed.stride(1) == 1 and out.is_contiguous()
    assert scale is None or scale.dtype == torch.float32
    assert added is None or (added.is_contiguous() and added.shape == out.shape)
    assert (scale is None) == (packing == "mxfp8")
    kind, _, rotated = packing.partition("_")
    if rotated:
        kernel, rows, columns = _rotate_kernel, _TILE, max(values, _TILE)
        more = {"HALF_BYTES": kind == "int4", "GROUP": values, "TILE": _TILE}
    else:
        kernel, rows, columns = _unpack_kernel, _ROWS, _COLUMNS
        more = {"KIND": kind, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
    kernel[(triton.cdiv(out.shape[0], rows), triton.cdiv(out.shape[1], columns))](
        packed,
        out if scale is None else scale,
        out,
        out if added is None else added,
        out.shape[0],
        out.shape[1],
        packed.stride(0),
        scale.stride(0) if scale is not None and scale.dim() else 0,
        ADD=added is not None,
        **more,
        num_warps=4,
        enable_fp_fusion=False,  # a fused multiply-add has other bits
    )


if triton is not None:

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
        ADD: tl.constexpr,
        KIND: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
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
            half = tl.where(code > 7, -0.5, 0.5)  # of a zero too, which has a sign
            value = halves.to(tl.float32) * half * (factor * of_block)
        elif KIND == "mxfp8":
            block = begin + column // 32 * 33
            power = (tl.load(block, mask=inside, other=0).to(tl.uint32) << 23).to(tl.float32, bitcast=True)
            value = e4m3(tl.load(block + 1 + column % 32, mask=inside, other=0).to(tl.uint32)) * power
        else:
            tl.static_assert(KIND == "int8")
            code = tl.load(begin + column, mask=inside, other=0).to(tl.int32)
            value = ((code ^ 128) - 128).to(tl.float32) * factor
        place = row * columns + column
        if ADD:
            value += tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _product(begin, start, inside, columns, matrix, HALF_BYTES: tl.constexpr, TILE: tl.constexpr):
        """Integers of rows, which begin there (TILE, 1), from column `start` on, times the matrix."""
        column = start + tl.arange(0, TILE)[None, :]
        inside &= column < columns
        if HALF_BYTES:
            byte = tl.load(begin + column // 2, mask=inside, other=0).to(tl.int32)
            value = (((byte >> (column % 2 * 4)) & 15) ^ 8) - 8
        else:
            value = (tl.load(begin + column, mask=inside, other=0).to(tl.int32) ^ 128) - 128
        return tl.dot(value.to(tl.float16), matrix)

    @triton.jit
    def _store(value, out, added, place, start, inside, columns, ADD: tl.constexpr, TILE: tl.constexpr):
        column = start + tl.arange(0, TILE)[None, :]
        if ADD:
            value += tl.load(added + place + column, mask=inside & (column < columns), other=0.0).to(tl.float32)
        tl.store(out + place + column, value.to(out.dtype.element_ty), mask=inside & (column < columns))

    @triton.jit(do_not_specialize=["scale_pitch"])
    def _rotate_kernel(
        packed,
        scale,
        out,
        added,
        rows,
        columns,
        pitch,
        scale_pitch,
        ADD: tl.constexpr,
        HALF_BYTES: tl.constexpr,
        GROUP: tl.constexpr,
        TILE: tl.constexpr,
    ):
        tl.static_assert(GROUP <= TILE or GROUP == 4 * TILE)
        row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
        # Each two bits of row and column that add up to 3 turn the sign; of another group the upper ones differ.
        differ = tl.arange(0, TILE)[:, None] ^ tl.arange(0, TILE)[None, :]
        threes = differ & (differ >> 1) & 0x15
        threes ^= (threes >> 4) ^ (threes >> 2)
        matrix = tl.where(differ < GROUP, 1 - 2 * (threes & 1), 0).to(tl.float16)
        factor = tl.load(scale + row * scale_pitch, mask=row < rows, other=0.0)
        begin, place = packed + row * pitch, row * columns
        if GROUP == 4 * TILE:
            start = tl.program_id(1) * GROUP
            first = _product(begin, start, row < rows, columns, matrix, HALF_BYTES, TILE)
            second = _product(begin, start + TILE, row < rows, columns, matrix, HALF_BYTES, TILE)
            third = _product(begin, start + 2 * TILE, row < rows, columns, matrix, HALF_BYTES, TILE)
            fourth = _product(begin, start + 3 * TILE, row < rows, columns, matrix, HALF_BYTES, TILE)
            total = (first + second) + (third + fourth)
            root: tl.constexpr = 1 / 16
            _store((total - 2 * fourth) * root * factor, out, added, place, start, row < rows, columns, ADD, TILE)
            _store((total - 2 * third) * root * factor, out, added, place, start + TILE, row < rows, columns, ADD, TILE)
            start += 2 * TILE
            _store((total - 2 * second) * root * factor, out, added, place, start, row < rows, columns, ADD, TILE)
            _store((total - 2 * first) * root * factor, out, added, place, start + TILE, row < rows, columns, ADD, TILE)
        else:
            start = tl.program_id(1) * TILE
            root: tl.constexpr = 1 / 8 if GROUP == 64 else 1 / 4 if GROUP == 16 else 1 / 2
            value = _product(begin, start, row < rows, columns, matrix, HALF_BYTES, TILE) * root * factor
            _store(value, out, added, place, start, row < rows, columns, ADD, TILE)
