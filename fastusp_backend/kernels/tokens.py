"""What happens to a token between two matrix products, in one pass over it: residual addition, adaLN, gelu or SwiGLU,
fp8.

A program holds a whole token in registers, so what is normed or quantised is read once; torch.compile reads rows of
this width twice or three times.

Shapes: x, y (B, L, C), shift, scale, gate (B, 1, C).
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
    """Keeps a float16 residual stream finite; other types pass through."""
    return torch.nan_to_num(x, nan=0.0, posinf=65504.0, neginf=-65504.0) if x.dtype == torch.float16 else x


def norm_reference(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(1 + scale) layer_norm(x) + shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


def add_reference(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + gate y."""
    return bounded(torch.addcmul(x, gate, y))


def add_norm_reference(x, y, gate, shift, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """x + gate y, and that normed."""
    x = add_reference(x, y, gate)
    return x, norm_reference(x, shift, scale)


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


def norm(x, shift, scale, *, fp8: bool) -> tuple[torch.Tensor, ...]:
    """(normed,), or its (values, scales) in fp8."""
    return _launch(x, None, None, shift, scale, fp8=fp8)


def add_norm(x, y, gate, shift, scale, *, fp8: bool) -> tuple[torch.Tensor, ...]:
    """(x + gate y, normed), or with the normed one's (values, scales) in fp8."""
    return _launch(x, y, gate, shift, scale, fp8=fp8)


def gelu_quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """gelu_tanh(x) in fp8: (values, scales)."""
    return _launch(x, None, None, None, None, gelu=True, fp8=True)


def swiglu_quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, L, 2 C) -> silu of the first half times the second, in fp8: (values, scales)."""
    return _launch(x, None, None, None, None, gated=True, fp8=True)


def quantise_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x in fp8: (values, scales)."""
    return _launch(x, None, None, None, None, fp8=True)


if triton is not None:

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
        summed,
        out,
        out_scales,
        rows,
        C: tl.constexpr,
        PITCH: tl.constexpr,
        BLOCK: tl.constexpr,
        ADD: tl.constexpr,
        NORM: tl.constexpr,
        GELU: tl.constexpr,
        GATED: tl.constexpr,
        FP8: tl.constexpr,
        BOUNDED: tl.constexpr,
        eps: tl.constexpr,
    ):
        # One program: one token.
        row = tl.program_id(0).to(tl.int64)
        item = tl.program_id(1).to(tl.int64)
        place = (item * rows + row) * C
        column = tl.arange(0, BLOCK)
        inside = column < C
        source = x + item * x_batch + row * PITCH + column
        value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        vector = item * modulation_batch + column
        if ADD:
            gates = tl.load(gate + vector, mask=inside, other=0.0).to(tl.float32)
            value += gates * tl.load(y + item * y_batch + row * C + column, mask=inside, other=0.0).to(tl.float32)
            if BOUNDED:
                value = tl.where(value != value, 0.0, tl.minimum(tl.maximum(value, -65504.0), 65504.0))
            # What is normed is what is stored.
            value = value.to(summed.dtype.element_ty).to(tl.float32)
            tl.store(summed + place + column, value.to(summed.dtype.element_ty), mask=inside)
        if NORM:
            mean = tl.sum(value, axis=0) / C
            centred = tl.where(inside, value - mean, 0.0)
            deviation = tl.rsqrt(tl.sum(centred * centred, axis=0) / C + eps)
            scales = tl.load(scale + vector, mask=inside, other=0.0).to(tl.float32)
            value = centred * deviation * (1 + scales) + tl.load(shift + vector, mask=inside, other=0.0).to(tl.float32)
        if GELU:
            # 0.5 x (1 + tanh(u)) = x sigmoid(2 u)
            value *= tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
        if GATED:
            value *= tl.sigmoid(value) * tl.load(source + C, mask=inside, other=0.0).to(tl.float32)
        if FP8:
            largest = tl.max(tl.where(inside, magnitudes(value), 0.0), axis=0)
            divisor = tl.where(largest > 0, largest / 448.0, 1.0)
            scaled = tl.minimum(tl.maximum(value / divisor, -448.0), 448.0)
            tl.store(out + place + column, scaled.to(out.dtype.element_ty), mask=inside)
            tl.store(out_scales + item * rows + row, tl.where(largest < float("inf"), largest / 448.0, float("nan")))
        else:
            tl.store(out + place + column, value.to(out.dtype.element_ty), mask=inside)


def _launch(x, y, gate, shift, scale, *, fp8: bool, gelu=False, gated=False) -> tuple[torch.Tensor, ...]:
    batch, rows, pitch = x.shape
    width = pitch // 2 if gated else pitch
    modulations = [m for m in (gate, shift, scale) if m is not None]
    for tensor in (x, y):
        assert tensor is None or tensor.stride()[1:] == (pitch, 1)
    assert all(m.stride(2) == 1 and m.stride(0) == modulations[0].stride(0) for m in modulations)
    summed = torch.empty_like(x) if y is not None else x
    out = x.new_empty(batch, rows, width, dtype=torch.float8_e4m3fn if fp8 else x.dtype)
    out_scales = x.new_empty(batch, rows, 1, dtype=torch.float32) if fp8 else x
    block = triton.next_power_of_2(width)
    _token_kernel[(rows, batch)](
        x,
        x.stride(0),
        x if y is None else y,
        0 if y is None else y.stride(0),
        x if gate is None else gate,
        x if shift is None else shift,
        x if scale is None else scale,
        modulations[0].stride(0) if modulations else 0,
        summed,
        out,
        out_scales,
        rows,
        C=width,
        PITCH=pitch,
        BLOCK=block,
        ADD=y is not None,
        NORM=scale is not None,
        GELU=gelu,
        GATED=gated,
        FP8=fp8,
        BOUNDED=x.dtype == torch.float16,
        eps=EPS,
        num_warps=min(16, max(1, block // 512)),
    )
    made = (out, out_scales) if fp8 else (out,)
    return (summed, *made) if y is not None else made
