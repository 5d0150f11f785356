"""Attended tokens to all the ranks that own them, by one kernel that writes into their memory.

A copy engine takes some microseconds to begin each copy, and with many ranks a rank has many small parts to send; this
begins once, and takes SMs for as long as it writes.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings no Triton
    triton = None

_BLOCK = 2048
"""Values that a program writes."""


def scatter(attended: torch.Tensor, peers: torch.Tensor, position: int, text: int, image: int, rows: slice) -> None:
    """Writes attended tokens to their owners, on the current stream.

    attended (B, N, h, D), contiguous: all tokens of a Ulysses group of U ranks, the text's of each rank first, U (text
        + image) = N.
    peers (U,) int64: where each rank's (B, L, U, h, D) begins, L = text + image, by Ulysses position. This rank's heads
        are those of index `position`.
    rows: which of the L tokens of each rank.
    """
    batch, gathered, heads, dim = attended.shape
    width, count = heads * dim, rows.stop - rows.start
    assert attended.is_contiguous() and gathered == len(peers) * (text + image)
    _scatter_kernel[(triton.cdiv(count * width, _BLOCK), len(peers), batch)](
        attended, peers, position, rows.start, count * width, text, image, WIDTH=width, BLOCK=_BLOCK, num_warps=4
    )


if triton is not None:

    @triton.jit(do_not_specialize=["position", "first", "text", "image"])
    def _scatter_kernel(
        attended, peers, position, first, values, text, image, WIDTH: tl.constexpr, BLOCK: tl.constexpr
    ):
        # One program: BLOCK values of what one rank gets of one batch item.
        value = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        to = tl.program_id(1)
        item = tl.program_id(2).to(tl.int64)
        ranks = tl.num_programs(1)
        inside = value < values
        row, column = first + value // WIDTH, value % WIDTH
        source = tl.where(row < text, to * text, ranks * text + to * image - text) + row
        whole = item * ranks * (text + image) + source
        moved = tl.load(attended + whole * WIDTH + column, mask=inside)
        there = tl.multiple_of(tl.load(peers + to).to(tl.pointer_type(attended.dtype.element_ty)), 16)
        target = (item * (text + image) + row) * ranks + position
        tl.store(there + target * WIDTH + column, moved, mask=inside)
