"""Sandwich norms in one pass over the tokens: what a residual addition takes is normed before it is added, and the sum
again for what follows. And SwiGLU of two products.

See tokens.py for why a program holds a whole token, which modulations there are, and how tokens are quantised. Weights
of norms and modulations are vectors of a token's width that every program reads from the cache, so that nothing is made
of them ahead of it. Products leave float16's range: what is normed behind one, and what SwiGLU gives, is bounded, as in
ComfyUI.

Shapes: x, y (B, L, C), gate, scale (B, 1, C), before, after (C,).
"""

import torch
import torch.nn.functional as F

from .tokens import bounded

try:
    import triton
    import triton.language as tl

    from .tokens import bounded_values, store_token
except ImportError:  # a CPU build of torch brings no Triton
    triton = None

EPS = 1e-5


def norm_reference(x: torch.Tensor, before: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(1 + scale) rms_norm(x) before."""
    return _rms_norm(x, before) * (1 + scale)


def add_reference(x: torch.Tensor, y: torch.Tensor, after: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + tanh(gate) rms_norm(y) after."""
    return torch.addcmul(x, gate.tanh(), _rms_norm(bounded(y), after))


def swiglu_reference(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """silu(gate) value."""
    return bounded(F.silu(gate) * value)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps=EPS)


def norm(x, before, scale, *, fp8: bool) -> tuple[torch.Tensor, ...]:
    """(normed,), or its (values, scales) in fp8."""
    return _launch(x, before=before, scale=scale, fp8=fp8)


def add(x, y, after, gate) -> torch.Tensor:
    """x + tanh(gate) rms_norm(y) after."""
    return _launch(x, y, after, gate, fp8=False)[0]


def add_norm(x, y, after, gate, before, scale, *, fp8: bool) -> tuple[torch.Tensor, ...]:
    """(the sum, normed), or with the normed one's (values, scales) in fp8."""
    return _launch(x, y, after, gate, before, scale, fp8=fp8)


def swiglu(gate: torch.Tensor, value: torch.Tensor, *, fp8: bool) -> tuple[torch.Tensor, ...]:
    """(silu(gate) value,), or its (values, scales) in fp8."""
    return _launch(gate, value, gated=True, fp8=fp8)


if triton is not None:

    @triton.jit
    def _sandwich_kernel(
        x,
        x_batch,
        y,
        y_batch,
        after,
        gate,
        before,
        scale,
        modulation_batch,
        summed,
        out,
        out_scales,
        tokens,
        C: tl.constexpr,
        BLOCK: tl.constexpr,
        ADD: tl.constexpr,
        NORM: tl.constexpr,
        GATED: tl.constexpr,
        FP8: tl.constexpr,
        BOUNDED: tl.constexpr,
        eps: tl.constexpr,
    ):
        # One program: one token.
        token = tl.program_id(0).to(tl.int64)
        item = tl.program_id(1).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < C
        place = (item * tokens + token) * C + column
        vector = item * modulation_batch + column
        value = tl.load(x + item * x_batch + token * C + column, mask=inside, other=0.0).to(tl.float32)
        if ADD or GATED:
            other = tl.load(y + item * y_batch + token * C + column, mask=inside, other=0.0).to(tl.float32)
            if GATED:
                value *= tl.sigmoid(value) * other
                if BOUNDED:
                    value = bounded_values(value)
            else:
                if BOUNDED:
                    other = bounded_values(other)
                other *= tl.rsqrt(tl.sum(other * other, axis=0) / C + eps)
                other *= tl.load(after + column, mask=inside, other=0.0).to(tl.float32)
                gates = tl.load(gate + vector, mask=inside, other=0.0).to(tl.float32)
                value += (2 * tl.sigmoid(2 * gates) - 1) * other  # tanh
                if NORM:  # what is normed is what is stored
                    value = value.to(summed.dtype.element_ty).to(tl.float32)
                    tl.store(summed + place, value.to(summed.dtype.element_ty), mask=inside)
        if NORM:
            value *= tl.rsqrt(tl.sum(value * value, axis=0) / C + eps)
            value *= tl.load(before + column, mask=inside, other=0.0).to(tl.float32)
            value *= 1 + tl.load(scale + vector, mask=inside, other=0.0).to(tl.float32)
        store_token(value, out + place, out_scales + item * tokens + token, inside, FP8)


def _launch(
    x, y=None, after=None, gate=None, before=None, scale=None, *, fp8: bool, gated=False
) -> tuple[torch.Tensor, ...]:
    batch, length, width = x.shape
    modulations = [m for m in (gate, scale) if m is not None]
    for tensor in (x, y):
        assert tensor is None or tensor.shape == x.shape and tensor.stride()[1:] == (width, 1)
    assert all(m.shape[1] == 1 and m.stride(2) == 1 and m.stride(0) == modulations[0].stride(0) for m in modulations)
    assert all(weight is None or weight.is_contiguous() for weight in (after, before))
    add, norm = after is not None, before is not None
    summed = torch.empty_like(x) if add and norm else x
    out = x.new_empty(batch, length, width, dtype=torch.float8_e4m3fn if fp8 else x.dtype)
    out_scales = x.new_empty(batch, length, 1, dtype=torch.float32) if fp8 else x
    block = triton.next_power_of_2(width)
    _sandwich_kernel[(length, batch)](
        x,
        x.stride(0),
        x if y is None else y,
        0 if y is None else y.stride(0),
        x if after is None else after,
        x if gate is None else gate,
        x if before is None else before,
        x if scale is None else scale,
        modulations[0].stride(0) if modulations else 0,
        summed,
        out,
        out_scales,
        length,
        C=width,
        BLOCK=block,
        ADD=add,
        NORM=norm,
        GATED=gated,
        FP8=fp8,
        BOUNDED=x.dtype == torch.float16,
        eps=EPS,
        num_warps=min(16, max(1, block // 512)),
    )
    made = (out, out_scales) if fp8 else (out,)
    return (summed, *made) if add and norm else made
