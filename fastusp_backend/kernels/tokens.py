"""What happens to a token between two matrix products, in one pass over it: residual addition, adaLN, gelu or SwiGLU,
fp8.

A program holds a whole token in registers, so what is normed or quantised is read once; torch.compile would read rows
of this width twice or three times. Modulations are one row for all tokens, or several of which each token takes its
own: the program then reads the row's number, so that no (B, L, C) of modulations is ever made.

Shapes: x, y (B, L, C), shift, scale, gate (B, n, C): n = 1, or any n with `rows` (L,) int64, the row that each token
takes.
"""

import torch
import torch.nn.functional as F

from .eight_bits import quantise

try:
    import triton
    import triton.language as tl

    from .eight_bits import magnitudes
except ImportError:  # a CPU build of torch brings no Triton
    triton = None

EPS = 1e-6


def available(device: torch.device) -> bool:
    return device.type == "cuda" and triton is not None


def bounded(x: torch.Tensor) -> torch.Tensor:
    """Keeps float16 finite; other types pass through."""
    return torch.nan_to_num(x, nan=0.0, posinf=65504.0, neginf=-65504.0) if x.dtype == torch.float16 else x


def norm_reference(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, rows=None) -> torch.Tensor:
    """(1 + scale) layer_norm(x) + shift."""
    shift, scale = (_of_tokens(modulation, rows) for modulation in (shift, scale))
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


def add_reference(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, rows=None) -> torch.Tensor:
    """x + gate y."""
    return bounded(torch.addcmul(x, _of_tokens(gate, rows), y))


def add_norm_reference(x, y, gate, shift, scale, rows=None) -> tuple[torch.Tensor, torch.Tensor]:
    """x + gate y, and that normed."""
    x = add_reference(x, y, gate, rows)
    return x, norm_reference(x, shift, scale, rows)


def _of_tokens(modulation: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """(B, 1, C), or with rows each token's own (B, L, C)."""
    return modulation if rows is None else modulation[:, rows]


def gelu_reference(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def swiglu_reference(x: torch.Tensor) -> torch.Tensor:
    """x (B, L, 2 C) -> silu of the first half times the second (B, L, C)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def quantise_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, L, C) -> e4m3 values, as x, and float32 scales (B, L, 1), one for each token."""
    values, scales = quantise(x)
    return values, scales[..., None]


def norm(x, shift, scale, rows=None, *, fp8: bool) -> tuple[torch.Tensor, ...]:
    """(normed,), or its (values, scales) in fp8."""
    return _launch(x, None, None, shift, scale, rows, fp8=fp8)


def add(x, y, gate, rows=None) -> torch.Tensor:
    """x + gate y."""
    return _launch(x, y, gate, None, None, rows, fp8=False)[0]


def add_norm(x, y, gate, shift, scale, rows=None, *, fp8: bool) -> tuple[torch.Tensor, ...]:
    """(x + gate y, normed), or with the normed one's (values, scales) in fp8."""
    return _launch(x, y, gate, shift, scale, rows, fp8=fp8)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x (B, L, 2 C) -> silu of the first half times the second (B, L, C)."""
    return _launch(x, gated=True, fp8=False)[0]


def gelu_quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """gelu_tanh(x) in fp8: (values, scales)."""
    return _launch(x, gelu=True, fp8=True)


def swiglu_quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, L, 2 C) -> silu of the first half times the second, in fp8: (values, scales)."""
    return _launch(x, gated=True, fp8=True)


def quantise_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x in fp8: (values, scales)."""
    return _launch(x, fp8=True)


if triton is not None:

    @triton.jit
    def bounded_values(value):
        """`bounded` of float32."""
        return tl.where(value != value, 0.0, tl.minimum(tl.maximum(value, -65504.0), 65504.0))

    @triton.jit
    def _tanh(value):
        """By the instruction of NVIDIA's GPUs, wrong by 2^-11 at most: enough for what becomes e4m3, which is all that
        it is for. With an exponential and a division these kernels would wait for the arithmetic, not for memory."""
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def store_token(value, out, out_scale, inside, FP8: tl.constexpr):
        """Stores a token's values at `out`; FP8: quantised, with their scale at `out_scale`."""
        if FP8:
            largest = tl.max(tl.where(inside, magnitudes(value), 0.0), axis=0)
            by = largest / 448.0
            inverse = 1.0 / tl.where(by >= 1.1754943508222875e-38, by, 1.0)  # of a smaller one it may be infinite
            scaled = tl.minimum(tl.maximum(value * inverse, -448.0), 448.0)
            tl.store(out, scaled.to(out.dtype.element_ty), mask=inside)
            tl.store(out_scale, tl.where(largest < float("inf"), largest / 448.0, float("nan")))
        else:
            tl.store(out, value.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _token_kernel(
        x,
        x_batch,
        y,
        y_batch,
        gate,
        shift,
        scale,
        modulation_batch,
        modulation_row,
        rows,
        summed,
        out,
        out_scales,
        tokens,
        C: tl.constexpr,
        PITCH: tl.constexpr,
        BLOCK: tl.constexpr,
        ADD: tl.constexpr,
        NORM: tl.constexpr,
        GELU: tl.constexpr,
        GATED: tl.constexpr,
        FP8: tl.constexpr,
        ROWS: tl.constexpr,
        BOUNDED: tl.constexpr,
        eps: tl.constexpr,
    ):
        # One program: one token.
        token = tl.program_id(0).to(tl.int64)
        item = tl.program_id(1).to(tl.int64)
        place = (item * tokens + token) * C
        column = tl.arange(0, BLOCK)
        inside = column < C
        source = x + item * x_batch + token * PITCH + column
        value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        vector = item * modulation_batch + column
        if ROWS:
            vector += tl.load(rows + token) * modulation_row
        if ADD:
            gates = tl.load(gate + vector, mask=inside, other=0.0).to(tl.float32)
            value += gates * tl.load(y + item * y_batch + token * C + column, mask=inside, other=0.0).to(tl.float32)
            if BOUNDED:
                value = bounded_values(value)
            if NORM:  # what is normed is what is stored
                value = value.to(summed.dtype.element_ty).to(tl.float32)
                tl.store(summed + place + column, value.to(summed.dtype.element_ty), mask=inside)
        if NORM:
            mean = tl.sum(value, axis=0) / C
            centred = tl.where(inside, value - mean, 0.0)
            deviation = tl.rsqrt(tl.sum(centred * centred, axis=0) / C + eps)
            scales = tl.load(scale + vector, mask=inside, other=0.0).to(tl.float32)
            value = centred * deviation * (1 + scales) + tl.load(shift + vector, mask=inside, other=0.0).to(tl.float32)
        if GELU:
            value *= 0.5 + 0.5 * _tanh(0.7978845608028654 * (value + 0.044715 * value * value * value))
        if GATED:
            other = tl.load(source + C, mask=inside, other=0.0).to(tl.float32)
            if FP8:  # sigmoid(x) = 0.5 + 0.5 tanh(x / 2)
                value *= (0.5 + 0.5 * _tanh(0.5 * value)) * other
            else:
                value *= tl.sigmoid(value) * other
        store_token(value, out + place + column, out_scales + item * tokens + token, inside, FP8)


def _launch(
    x, y=None, gate=None, shift=None, scale=None, rows=None, *, fp8: bool, gelu=False, gated=False
) -> tuple[torch.Tensor, ...]:
    batch, length, pitch = x.shape
    width = pitch // 2 if gated else pitch
    modulations = [m for m in (gate, shift, scale) if m is not None]
    for tensor in (x, y):
        assert tensor is None or tensor.stride()[1:] == (pitch, 1)
    assert all(m.stride(2) == 1 and m.stride()[:2] == modulations[0].stride()[:2] for m in modulations)
    if rows is None:
        assert all(m.shape[1] == 1 for m in modulations)
    else:
        assert rows.shape == (length,) and rows.is_contiguous()
    add, norm = y is not None, scale is not None
    summed = torch.empty_like(x) if add and norm else x
    out = x.new_empty(batch, length, width, dtype=torch.float8_e4m3fn if fp8 else x.dtype)
    out_scales = x.new_empty(batch, length, 1, dtype=torch.float32) if fp8 else x
    block = triton.next_power_of_2(width)
    _token_kernel[(length, batch)](
        x,
        x.stride(0),
        y if add else x,
        y.stride(0) if add else 0,
        x if gate is None else gate,
        x if shift is None else shift,
        x if scale is None else scale,
        modulations[0].stride(0) if modulations else 0,
        0 if rows is None else modulations[0].stride(1),
        x if rows is None else rows,
        summed,
        out,
        out_scales,
        length,
        C=width,
        PITCH=pitch,
        BLOCK=block,
        ADD=add,
        NORM=norm,
        GELU=gelu,
        GATED=gated,
        FP8=fp8,
        ROWS=rows is not None,
        BOUNDED=x.dtype == torch.float16,
        eps=EPS,
        # Measured on an H200 for widths of 3072 and 12288: 4 and 8. More values than 64 a thread need memory.
        num_warps=min(16, max(1, min(8, block // 1024), block // 2048)),
    )
    made = (out, out_scales) if fp8 else (out,)
    return (summed, *made) if add and norm else made
