"""fp8 weights in 16 or 32 bits, times their scale, in one pass over them at the speed of memory.

torch's conversion reads single bytes, and its product with the scale is another pass: FLUX.1's 8.6e9 weights took 20 ms
of each step on H100s, of which reading and writing them once is 9.
"""

import torch

from .tokens import available

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings no Triton
    triton = None

_COLUMNS = 2048
"""Values of a program."""


def widen(data: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """data (..., n) e4m3fn or e5m2 -> its values (..., n) in `dtype`. scale: () or (rows, 1), rounded to `dtype` and
    multiplied there, as ComfyUI does."""
    if not available(data.device) or data.dim() == 0 or data.numel() == 0:
        return widen_reference(data, scale, dtype)
    rows = data.reshape(-1, data.shape[-1])
    assert rows.stride(1) == 1, data.stride()
    out = torch.empty(data.shape, dtype=dtype, device=data.device)
    _widen_kernel[(rows.shape[0], triton.cdiv(rows.shape[1], _COLUMNS))](
        rows.view(torch.uint8),
        out if scale is None else scale,
        out,
        rows.shape[1],
        rows.stride(0),
        int(scale is not None and scale.dim() == 2),
        E4M3=data.dtype == torch.float8_e4m3fn,
        SCALED=scale is not None,
        COLUMNS=_COLUMNS,
        num_warps=4,
    )
    return out


def widen_reference(data: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The same by torch's own operations."""
    values = data.to(dtype)
    return values if scale is None else values.mul_(scale.to(dtype))


if triton is not None:

    @triton.jit
    def e4m3(code):
        """The values, float32, of codes uint32."""
        # Exponent and mantissa where float32 has them, times what the exponents differ by: exact, subnormals too.
        value = ((code & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        value = tl.where((code & 0x7F) == 0x7F, float("nan"), value)
        signed = value.to(tl.uint32, bitcast=True) | (code & 0x80) << 24  # -value would make 0 of -0
        return signed.to(tl.float32, bitcast=True)

    @triton.jit(do_not_specialize=["scale_pitch"])
    def _widen_kernel(
        data,
        scale,
        out,
        columns,
        pitch,
        scale_pitch,
        E4M3: tl.constexpr,
        SCALED: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        mask = column < columns
        code = tl.load(data + row * pitch + column, mask=mask, other=0).to(tl.uint32)
        if E4M3:
            value = e4m3(code)
        else:  # the upper byte of a float16
            value = (code << 8).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        wide = value.to(out.dtype.element_ty)
        if SCALED:
            factor = tl.load(scale + row * scale_pitch).to(out.dtype.element_ty)
            wide = (wide.to(tl.float32) * factor.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(out + row * columns + column, wide, mask=mask)
