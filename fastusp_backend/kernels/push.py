"""One kernel that writes to all peers' memory, where each would take a copy: what a copy takes to begin, some
microseconds, is most of it when tokens are cut into many parts.

Copy engines take no SMs from what computes meanwhile; this takes a few.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings no Triton
    triton = None

_TILE = 4096
"""int32 words that a program copies at a time."""


def push(
    sources: torch.Tensor,
    step: int,
    bases: torch.Tensor,
    first: int,
    skipped: int,
    peers: int,
    offset: int,
    shape: tuple[int, int],
    pitches: tuple[int, int],
    programs: int,
) -> None:
    """Writes a matrix to each of `peers` peers, on the current stream.

    sources, step: the first peer's matrix (int32 words), and how many words further the next one's begins.
    bases (P,) int64: addresses of the ranks' memory. offset: where in each, in words, the matrix goes.
    first, skipped: the first peer's position, and the one among them that is left out (-1 for none).
    shape: rows and words of a row; pitches: words from row to row at the peers and in the source.
    programs: how many work for each peer.
    """
    rows, width = shape
    columns = min(_TILE, triton.next_power_of_2(width))
    _push_kernel[(programs, peers)](
        sources,
        step,
        bases,
        first,
        skipped,
        offset,
        rows,
        width,
        *pitches,
        ROWS=_TILE // columns,
        COLUMNS=columns,
        PROGRAMS=programs,
        num_warps=8,
    )


if triton is not None:

    @triton.jit(do_not_specialize=["first", "skipped"])
    def _push_kernel(
        sources,
        step,
        bases,
        first,
        skipped,
        offset,
        rows,
        width,
        target_pitch,
        source_pitch,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        PROGRAMS: tl.constexpr,
    ):
        position = first + tl.program_id(1)
        position += ((skipped >= first) & (position >= skipped)).to(tl.int32)
        source = sources + (position - first).to(tl.int64) * step
        base = tl.multiple_of(tl.load(bases + position), 16)
        target = base.to(tl.pointer_type(tl.int32)) + offset
        across = tl.cdiv(width, COLUMNS)
        for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS) * across, PROGRAMS):
            row = (tile // across * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
            column = (tile % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
            mask = (row < rows) & (column < width)
            words = tl.load(source + row * source_pitch + column, mask=mask)
            tl.store(target + row * target_pitch + column, words, mask=mask)
