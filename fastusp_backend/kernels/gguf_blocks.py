"""GGUF's blocks to 16 or 32 bits in one pass over them: what is read is the packed bytes, what is written the values.

In torch's separate operations each of some ten steps reads and writes float32. `weights/gguf_blocks.py` holds these
operations, the reference: the same ones in the same order, none fused with another, so that all bits are equal.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings no Triton
    triton = None

_TILE = 1024
"""Values of a program."""


def unpack(
    packed: torch.Tensor, packing: str, values: int, size: int, out: torch.Tensor, added: torch.Tensor | None = None
) -> None:
    """packed (R, bytes) uint8, any row pitch, of a format whose blocks hold `values` values in `size` bytes -> out (R,
    n), contiguous. added (R, n): a float type, added in float32."""
    assert packed.stride(1) == 1 and packed.stride(0) % 2 == packed.data_ptr() % 2 == 0 and out.is_contiguous()
    assert added is None or (added.is_contiguous() and added.shape == out.shape)
    blocks = out.shape[1] // values
    count = _TILE // values
    _unpack_kernel[(triton.cdiv(out.shape[0] * blocks, count),)](
        packed,
        out,
        out if added is None else added,
        packed.stride(0),
        blocks,
        out.shape[0] * blocks,
        PACKING=packing,
        VALUES=values,
        SIZE=size,
        ADD=added is not None,
        COUNT=count,
        num_warps=4,
        enable_fp_fusion=False,  # a fused multiply-add has other bits
    )


if triton is not None:

    @triton.jit
    def _half(block, offset, inside):
        """The float16 at that byte of each block, in float32."""
        pointer = (block + offset).to(tl.pointer_type(tl.float16))
        return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _byte(block, offset, inside):
        return tl.load(block + offset, mask=inside, other=0).to(tl.int32)

    @triton.jit
    def _signed(byte):
        return (byte ^ 128) - 128

    @triton.jit
    def _sub_scales(block, part, inside):
        """The 6-bit scale and minimum of sub-block `part` of Q4_K and Q5_K, from 12 bytes at byte 4."""
        low = part & 3
        scale, minimum = _byte(block, 4 + low, inside), _byte(block, 8 + low, inside)
        last = _byte(block, 12 + low, inside)
        late = part > 3
        high_scale, high_minimum = (last & 15) | ((scale >> 2) & 48), (last >> 4) | ((minimum >> 2) & 48)
        scale, minimum = tl.where(late, high_scale, scale & 63), tl.where(late, high_minimum, minimum & 63)
        return scale.to(tl.float32), minimum.to(tl.float32)

    @triton.jit
    def _unpack_kernel(
        packed,
        out,
        added,
        pitch,
        blocks,
        total,
        PACKING: tl.constexpr,
        VALUES: tl.constexpr,
        SIZE: tl.constexpr,
        ADD: tl.constexpr,
        COUNT: tl.constexpr,
    ):
        # One program: COUNT blocks; j counts the values of one.
        number = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)[:, None]
        inside = number < total
        block = packed + number // blocks * pitch + number % blocks * SIZE
        j = tl.arange(0, VALUES)[None, :]
        if VALUES == 32:
            i, shift = j % 16, j // 16 * 4  # the low halves of 16 bytes, then the high ones
        else:
            i, shift = j // 128 * 32 + j % 32, j % 128 // 32 * 2  # 2 bits of 32 bytes after the other
        if PACKING == "Q8_0":
            value = _signed(_byte(block, 2 + j, inside)).to(tl.float32) * _half(block, 0, inside)
        elif PACKING == "Q4_0":
            quant = ((_byte(block, 2 + i, inside) >> shift) & 15) - 8
            value = quant.to(tl.float32) * _half(block, 0, inside)
        elif PACKING == "Q4_1":
            quant = (_byte(block, 4 + i, inside) >> shift) & 15
            value = quant.to(tl.float32) * _half(block, 0, inside) + _half(block, 2, inside)
        elif PACKING == "Q5_0":
            fifth = (_byte(block, 2 + j // 8, inside) >> (j % 8)) & 1
            quant = ((_byte(block, 6 + i, inside) >> shift) & 15 | fifth << 4) - 16
            value = quant.to(tl.float32) * _half(block, 0, inside)
        elif PACKING == "Q5_1":
            fifth = (_byte(block, 4 + j // 8, inside) >> (j % 8)) & 1
            quant = (_byte(block, 8 + i, inside) >> shift) & 15 | fifth << 4
            value = quant.to(tl.float32) * _half(block, 0, inside) + _half(block, 2, inside)
        elif PACKING == "Q2_K":
            both = _byte(block, j // 16, inside)
            quant = (_byte(block, 16 + i, inside) >> shift) & 3
            scale = _half(block, 80, inside) * (both & 15).to(tl.float32)
            value = scale * quant.to(tl.float32) - _half(block, 82, inside) * (both >> 4).to(tl.float32)
        elif PACKING == "Q3_K":
            part = j // 16
            high = ((_byte(block, j % 32, inside) >> (j // 32)) & 1) ^ 1
            quant = ((_byte(block, 32 + i, inside) >> shift) & 3) - (high << 2)
            low = (_byte(block, 96 + part % 8, inside) >> (part // 8 * 4)) & 15
            scale = (low | ((_byte(block, 104 + part % 4, inside) >> (part // 4 * 2)) & 3) << 4) - 32
            value = _half(block, 108, inside) * scale.to(tl.float32) * quant.to(tl.float32)
        elif PACKING == "Q6_K":
            low = (_byte(block, j // 128 * 64 + j % 64, inside) >> (j % 128 // 64 * 4)) & 15
            quant = (low | ((_byte(block, 128 + i, inside) >> shift) & 3) << 4) - 32
            scale = _signed(_byte(block, 192 + j // 16, inside))
            value = _half(block, 208, inside) * scale.to(tl.float32) * quant.to(tl.float32)
        else:
            tl.static_assert(PACKING == "Q4_K" or PACKING == "Q5_K")
            part, nibbles = j // 32, j // 64 * 32 + j % 32
            start: tl.constexpr = 16 if PACKING == "Q4_K" else 48
            quant = (_byte(block, start + nibbles, inside) >> (part % 2 * 4)) & 15
            if PACKING == "Q5_K":
                quant |= ((_byte(block, 16 + j % 32, inside) >> part) & 1) << 4
            scale, minimum = _sub_scales(block, part, inside)
            scale = _half(block, 0, inside) * scale
            value = scale * quant.to(tl.float32) - _half(block, 2, inside) * minimum
        place = number * VALUES + j
        if ADD:
            value += tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
