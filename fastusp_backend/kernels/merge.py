"""Joins attention over one more part of the keys to what was attended before, in one pass over both results.

A ring attends block by block; partial results are weighted by their log-sum-exp, in float32 (arXiv 2310.01889). In
torch's separate operations (`merge_reference`, which CPU ranks run) each of several steps reads and writes the results.

Shapes: B batch, L tokens, H heads, D head dim.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings no Triton
    triton = None

_ROWS = 32


def merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Joins part (B, L, H, D), part_lse (B, H, L) into out (B, L, H, D) and lse (B, H, L), both float32 and
    contiguous: results of attention over two disjoint sets of keys.

    With s = sigmoid(part_lse - lse), the weight of the part: out' = out + s (part - out), lse' = log(e^lse +
    e^part_lse).
    """
    if out.is_cuda and triton is not None:
        _launch(out, lse, part, part_lse)
    else:
        merge_reference(out, lse, part, part_lse)


def merge_reference(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """The same in plain torch."""
    weight = torch.sigmoid(part_lse - lse).transpose(1, 2)[..., None]
    out += weight * (part.float() - out)
    lse.copy_(torch.logaddexp(lse, part_lse))


if triton is not None:

    @triton.jit
    def _merge_kernel(
        out,
        lse,
        part,
        part_batch,
        part_row,
        part_head,
        part_lse,
        lse_batch,
        lse_head,
        lse_row,
        rows,
        heads,
        D: tl.constexpr,
        R: tl.constexpr,
    ):
        # One program: R rows of one head of one batch item.
        row = tl.program_id(0) * R + tl.arange(0, R)
        head = tl.program_id(1)
        item = tl.program_id(2).to(tl.int64)
        inside = row < rows
        wide_row = row.to(tl.int64)
        own_lse = lse + (item * heads + head) * rows + row
        new_lse = part_lse + item * lse_batch + head * lse_head + wide_row * lse_row
        a = tl.load(own_lse, mask=inside, other=0.0)
        b = tl.load(new_lse, mask=inside, other=0.0)
        weight = tl.sigmoid(b - a)[:, None]
        column = tl.arange(0, D)[None, :]
        own = out + ((item * rows + wide_row[:, None]) * heads + head) * D + column
        new = part + item * part_batch + wide_row[:, None] * part_row + head * part_head + column
        before = tl.load(own, mask=inside[:, None], other=0.0)
        value = tl.load(new, mask=inside[:, None], other=0.0).to(tl.float32)
        tl.store(own, before + weight * (value - before), mask=inside[:, None])
        high = tl.maximum(a, b)
        tl.store(own_lse, high + tl.log(tl.exp(a - high) + tl.exp(b - high)), mask=inside)


def _launch(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    batch, rows, heads, dim = out.shape
    assert out.is_contiguous() and lse.is_contiguous() and part.stride(3) == 1 and part_lse.dtype == torch.float32
    _merge_kernel[(triton.cdiv(rows, _ROWS), heads, batch)](
        out,
        lse,
        part,
        part.stride(0),
        part.stride(1),
        part.stride(2),
        part_lse,
        *part_lse.stride(),
        rows,
        heads,
        D=dim,
        R=_ROWS,
    )
