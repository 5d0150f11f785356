"""Keys and values less their means, and heads in 8 bits: what 8-bit attention reads.

A head's keys have much in common: a mean over the tokens, far larger in some channels than what tells one key from
another. Codes of few bits spend their range on it. A key's mean adds the same q . mean to all scores of a query, which
softmax does not see, so that attention may take the keys without it (SageAttention, arXiv 2410.02367). The log-sum-exp
does see it: `shift` is what it lacks, before scaling.

FlashAttention-3 takes e4m3 with one scale per (batch item, head) for each of q, k and v: amax / 448 over all tokens of
the head, so that its values are known when all are. Hopper's tensor cores cut each product of e4m3 to 14 bits of the
largest one in a sum, the sum so far included (DeepSeek-V3, arXiv 2412.19437): of thousands of values with a mean the
later ones are lost. So values go in without theirs, and `add_mean` adds it to what comes out: the weights of softmax
sum to 1, those of a ring's part too.

Three kernels: sums, minima and maxima of each channel over runs of tokens; these over all runs; the values. No order of
additions depends on timing.

Shapes: B batch, L tokens of queries or keys, h heads, D head dim.
"""

from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings no Triton
    triton = None

LARGEST = 448.0
"""The largest value of e4m3."""
_RUN, _SEEN, _RUNS, _ROWS = 256, 32, 64, 64
"""Tokens that one program of the first kernel sees, tokens at a time, runs at a time in the second, and tokens of one
program of the last."""


class Heads(NamedTuple):
    """Queries, and keys and values less their means, in 8 bits.

    q, k, v: (B, L, h, D) e4m3.
    scales: of the three, (3, B, h) float32: a head is about its codes times its scale.
    shift: (B, h, Lq) float32, q . mean of the keys.
    mean: (B, h, D) float32, of the values.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scales: torch.Tensor
    shift: torch.Tensor
    mean: torch.Tensor


def smooth(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, Lq, h, D), k (B, Lk, h, D) of any strides but the last -> keys less their mean over the tokens, as k and
    contiguous, and the shift (B, h, Lq) float32."""
    return _launch_smooth(q, k) if k.is_cuda and triton is not None else smooth_reference(q, k)


def smooth_reference(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch."""
    mean = k.float().mean(1, keepdim=True)
    return (k.float() - mean).to(k.dtype), torch.einsum("blhd,bhd->bhl", q.float(), mean[:, 0])


def quantise_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Heads:
    """q (B, Lq, h, D), k and v (B, Lk, h, D) of any strides but the last. A head that is not finite becomes NaN."""
    return _launch_quantise(q, k, v) if k.is_cuda and triton is not None else quantise_heads_reference(q, k, v)


def quantise_heads_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Heads:
    """The same in plain torch."""
    codes, scales = [], []
    mean = v.float().mean(1, keepdim=True)
    for x in (q.float(), k.float() - k.float().mean(1, keepdim=True), v.float() - mean):
        scale = x.abs().amax((1, 3)) / LARGEST
        divisor = torch.where(scale > 0, scale, 1.0)[:, None, :, None]
        codes.append((x / divisor).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn))
        scales.append(torch.where(scale.isfinite(), scale, torch.nan))
    return Heads(*codes, torch.stack(scales), smooth_reference(q, k)[1], mean[:, 0])


def add_mean(out: torch.Tensor, mean: torch.Tensor) -> None:
    """Adds mean (B, h, D) float32 to out (B, L, h, D) of any strides but the last, in float32, rounded to its type."""
    if out.is_cuda and triton is not None:
        batch, rows, heads, dim = out.shape
        assert out.stride(3) == 1 and mean.is_contiguous() and mean.shape == (batch, heads, dim)
        _add_mean_kernel[(heads, triton.cdiv(rows, _ROWS), batch)](
            out, *out.stride()[:3], mean, rows, heads, D=dim, R=_ROWS
        )
    else:
        out += mean[:, None]


if triton is not None:

    @triton.jit
    def _tile(x, x_batch, x_row, x_head, item, head, row, rows, D: tl.constexpr):
        """Rows `row` of one head of one batch item, float32; zeros behind the last."""
        place = x + item.to(tl.int64) * x_batch + row[:, None].to(tl.int64) * x_row + head * x_head
        return tl.load(place + tl.arange(0, D)[None, :], mask=(row < rows)[:, None], other=0.0).to(tl.float32)

    @triton.jit
    def _observe(x, x_batch, x_row, x_head, item, head, rows, out, D: tl.constexpr, RUN: tl.constexpr, R: tl.constexpr):
        """Sums, minima and maxima of a run's channels into out (3, D)."""
        first = tl.program_id(1) * RUN
        # A run is reduced once, at its end: reductions go through shared memory.
        total = tl.zeros((R, D), tl.float32)
        low = tl.full((R, D), float("inf"), tl.float32)
        high = tl.full((R, D), float("-inf"), tl.float32)
        for start in tl.static_range(0, RUN, R):
            row = first + start + tl.arange(0, R)
            inside = (row < rows)[:, None]
            value = _tile(x, x_batch, x_row, x_head, item, head, row, rows, D)
            total += value
            low = tl.minimum(low, tl.where(inside, value, float("inf")))
            high = tl.maximum(high, tl.where(inside, value, float("-inf")))
        column = tl.arange(0, D)
        tl.store(out + column, tl.sum(total, axis=0))
        tl.store(out + D + column, tl.min(low, axis=0))
        tl.store(out + 2 * D + column, tl.max(high, axis=0))

    @triton.jit
    def _observe_kernel(
        q,
        q_batch,
        q_row,
        q_head,
        k,
        k_batch,
        k_row,
        k_head,
        v,
        v_batch,
        v_row,
        v_head,
        out,
        queries,
        keys,
        batch,
        FIRST: tl.constexpr,
        D: tl.constexpr,
        RUN: tl.constexpr,
        R: tl.constexpr,
    ):
        # One program: a run of tokens of one head of one (tensor, batch item); FIRST: 1 leaves the queries out. Heads,
        # which lie beside each other, are at work at the same time.
        head, item, tensor = tl.program_id(0), tl.program_id(2) % batch, tl.program_id(2) // batch + FIRST
        place = (tl.program_id(2) * tl.num_programs(0) + head).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        if tensor == 0:
            _observe(q, q_batch, q_row, q_head, item, head, queries, out + place * 3 * D, D, RUN, R)
        elif tensor == 1:
            _observe(k, k_batch, k_row, k_head, item, head, keys, out + place * 3 * D, D, RUN, R)
        else:
            _observe(v, v_batch, v_row, v_head, item, head, keys, out + place * 3 * D, D, RUN, R)

    @triton.jit
    def _finish_kernel(
        observed, means, scales, runs, keys, batch, FIRST: tl.constexpr, D: tl.constexpr, RUNS: tl.constexpr
    ):
        # One program: one head of one (tensor, batch item), over all runs.
        head, tensor = tl.program_id(0), tl.program_id(1) // batch + FIRST
        place = (tl.program_id(1) * tl.num_programs(0) + head).to(tl.int64)
        column = tl.arange(0, D)
        total = tl.zeros((D,), tl.float32)
        low = tl.full((D,), float("inf"), tl.float32)
        high = tl.full((D,), float("-inf"), tl.float32)
        for start in range(0, runs, RUNS):
            run = start + tl.arange(0, RUNS)
            base = observed + (place * runs + run[:, None]) * 3 * D + column[None, :]
            inside = (run < runs)[:, None]
            total += tl.sum(tl.load(base, mask=inside, other=0.0), axis=0)
            low = tl.minimum(low, tl.min(tl.load(base + D, mask=inside, other=float("inf")), axis=0))
            high = tl.maximum(high, tl.max(tl.load(base + 2 * D, mask=inside, other=float("-inf")), axis=0))
        mean = total / keys
        if tensor == 0:
            mean = tl.zeros((D,), tl.float32)
        else:
            of = tl.program_id(1) - (1 - FIRST) * batch
            tl.store(means + (of * tl.num_programs(0) + head) * D + column, mean)
        scale = tl.max(tl.maximum(high - mean, mean - low), axis=0) / 448.0
        # Maxima of a GPU pass NaN over; sums do not.
        all_of_it = tl.sum(total, axis=0)
        tl.store(scales + place, tl.where(all_of_it - all_of_it == 0, scale, float("nan")))

    @triton.jit
    def _put(
        x, x_batch, x_row, x_head, item, head, heads, row, rows, mean, scale, out, EIGHT: tl.constexpr, D: tl.constexpr
    ):
        """Writes rows less a mean (D,) into out (B, L, h, D), in its type, EIGHT: as codes. Returns what it read."""
        value = _tile(x, x_batch, x_row, x_head, item, head, row, rows, D)
        wanted = value - mean[None, :]
        if EIGHT:
            wanted = wanted * (1.0 / tl.where(scale >= 1.1754943508222875e-38, scale, 1.0))  # else infinite, perhaps
            wanted = tl.minimum(tl.maximum(wanted, -448.0), 448.0)
        place = out + ((item.to(tl.int64) * rows + row[:, None]) * heads + head) * D + tl.arange(0, D)[None, :]
        tl.store(place, wanted.to(out.dtype.element_ty), mask=(row < rows)[:, None])
        return value

    @triton.jit
    def _write_kernel(
        q,
        q_batch,
        q_row,
        q_head,
        k,
        k_batch,
        k_row,
        k_head,
        v,
        v_batch,
        v_row,
        v_head,
        out_q,
        out_k,
        out_v,
        means,
        scales,
        shift,
        queries,
        keys,
        batch,
        EIGHT: tl.constexpr,
        D: tl.constexpr,
        R: tl.constexpr,
    ):
        # One program: R rows of one head of one (tensor, batch item).
        row, head = tl.program_id(1) * R + tl.arange(0, R), tl.program_id(0)
        item, tensor = tl.program_id(2) % batch, tl.program_id(2) // batch
        heads = tl.num_programs(0)
        of = tl.maximum(tensor - 1, 0) * batch + item  # queries are multiplied with the mean of keys
        mean = tl.load(means + (of * heads + head) * D + tl.arange(0, D))
        none = tl.zeros((D,), tl.float32)
        scale = 1.0
        if EIGHT:
            scale = tl.load(scales + tl.program_id(2) * heads + head)
        if tensor == 0:
            if EIGHT:
                value = _put(q, q_batch, q_row, q_head, item, head, heads, row, queries, none, scale, out_q, EIGHT, D)
            else:
                value = _tile(q, q_batch, q_row, q_head, item, head, row, queries, D)
            place = shift + (item * heads + head).to(tl.int64) * queries + row
            tl.store(place, tl.sum(value * mean[None, :], axis=1), mask=row < queries)
        elif tensor == 1:
            _put(k, k_batch, k_row, k_head, item, head, heads, row, keys, mean, scale, out_k, EIGHT, D)
        else:
            _put(v, v_batch, v_row, v_head, item, head, heads, row, keys, mean, scale, out_v, EIGHT, D)

    @triton.jit
    def _add_mean_kernel(out, out_batch, out_row, out_head, mean, rows, heads, D: tl.constexpr, R: tl.constexpr):
        head, row, item = tl.program_id(0), tl.program_id(1) * R + tl.arange(0, R), tl.program_id(2)
        value = _tile(out, out_batch, out_row, out_head, item, head, row, rows, D)
        value += tl.load(mean + (item * heads + head) * D + tl.arange(0, D))[None, :]
        place = out + item.to(tl.int64) * out_batch + row[:, None].to(tl.int64) * out_row + head * out_head
        tl.store(place + tl.arange(0, D)[None, :], value.to(out.dtype.element_ty), mask=(row < rows)[:, None])


def _launch_smooth(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    smoothed = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    return smoothed, _launch(q, k, k, (smoothed,) * 3)[1]


def _launch_quantise(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Heads:
    codes = tuple(torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device) for x in (q, k, v))
    scales, shift, means = _launch(q, k, v, codes)
    return Heads(*codes, scales, shift, means[1])


def _launch(q, k, v, out: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Writes into `out`, by its type codes of all three or smoothed keys alone -> scales, shift, and the means of keys
    and, with codes, of values."""
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    assert k.shape == v.shape == (batch, keys, heads, dim) and q.stride(3) == k.stride(3) == v.stride(3) == 1
    eight = out[1].dtype == torch.float8_e4m3fn
    first, last = (0, 3) if eight else (1, 2)
    longest = max(queries, keys) if eight else keys
    runs = triton.cdiv(longest, _RUN)
    like = {"dtype": torch.float32, "device": q.device}
    observed = torch.empty(last - first, batch, heads, runs, 3, dim, **like)
    means, scales = torch.empty(last - 1, batch, heads, dim, **like), torch.empty(last - first, batch, heads, **like)
    shift = torch.empty(batch, heads, queries, **like)
    given = [part for x in (q, k, v) for part in (x, *x.stride()[:3])]
    _observe_kernel[(heads, runs, (last - first) * batch)](
        *given, observed, queries, keys, batch, FIRST=first, D=dim, RUN=_RUN, R=_SEEN
    )
    _finish_kernel[(heads, (last - first) * batch)](
        observed, means, scales, runs, keys, batch, FIRST=first, D=dim, RUNS=_RUNS
    )
    _write_kernel[(heads, triton.cdiv(max(queries, keys), _ROWS), last * batch)](
        *given, *out, means, scales, shift, queries, keys, batch, EIGHT=eight, D=dim, R=_ROWS
    )
    return scales, shift, means
