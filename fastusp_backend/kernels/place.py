"""From a projection to the buffers of an exchange in one pass: split heads, normalise q and k, rotate, lay out.

One program takes some rows of one head of one tensor: a head's norm and rotation need nothing of other heads, and all
of a head goes to one rank. A head of this rank (`position`) goes into `received` at the row where attention reads it,
any other into `outgoing` for the rank that attends it, packed in 8 bits (eight_bits.py) where `outgoing` holds bytes.
So everything is read and written once, and an exchange has nothing left to lay out. torch's separate operations
(`place_reference`, which CPU ranks run) write normed and rotated tensors in full before they copy them part by part;
compiled, they would be compiled again for each layout and each rank's place in it.

Shapes: B batch, R rows, T tensors (of q, k, v), H heads, h of them on a rank, D head dim, U ranks of a Ulysses group, N
rows that attention reads, L a rank's rows; projected (B, R, T H D).
"""

import torch
import torch.nn.functional as F

from . import eight_bits

try:
    import triton
    import triton.language as tl

    from .eight_bits import store_packed
except ImportError:  # a CPU build of torch brings no Triton
    triton = None

EPS = 1e-6

Regions = list[tuple[slice, slice]]
"""Where this rank's own rows go: (local rows, rows of `received`), text first, then image."""


def place(
    projected: torch.Tensor,
    scales: tuple[torch.Tensor | None, ...],
    rope: tuple[torch.Tensor, torch.Tensor] | None,
    which: slice,
    first_row: int,
    received: torch.Tensor,
    outgoing: torch.Tensor,
    position: int,
    regions: Regions,
    eps: float = EPS,
    peers: torch.Tensor | None = None,
) -> None:
    """Writes tensors `which` of local rows [first_row, first_row + R).

    scales: per tensor the RMS norm's weight (D,), or None for one that is neither normed nor rotated: v, or all three.
    rope: cos, sin (R, D / 2) float32, of neighbouring pairs; None where nothing is rotated.
    received: (3, B, N, h, D).
    outgoing: (3, U, B, L, h, D), or packed (3, U, B, L, pitch) uint8 or int8: see comm/links.py.
    position: this rank's in its Ulysses group.
    regions: where its own rows go.
    eps: epsilon of the norms.
    peers: the addresses (U,) int64 of all ranks' `received`, this one's too, where a head goes to its rank at once:
        nothing is written to `outgoing` then. For CUDA devices with Triton.
    """
    if projected.is_cuda and triton is not None:
        _launch(projected, scales, rope, which, first_row, received, outgoing, position, regions, eps, peers)
    else:
        assert peers is None
        place_reference(projected, scales, rope, which, first_row, received, outgoing, position, regions, eps)


def place_reference(projected, scales, rope, which, first_row, received, outgoing, position, regions, eps=EPS) -> None:
    """The same in plain torch."""
    d = received.shape[-1]
    x = projected.unflatten(-1, (len(scales), -1, d))  # B, R, T, H, D
    local_heads = received.shape[3]
    rows = slice(first_row, first_row + x.shape[1])
    for i, (tensor, scale) in enumerate(zip(range(*which.indices(3)), scales, strict=True)):
        value = x[:, :, i]
        if scale is not None:
            value = F.rms_norm(value, (d,), scale.to(value.dtype), eps=eps)
            value = value if rope is None else rotate(value, *rope)
        for rank, part in enumerate(value.split(local_heads, dim=2)):
            if rank != position:
                if outgoing.dtype in eight_bits.LARGEST:
                    eight_bits.pack_reference(part, outgoing[tensor, rank, :, rows])
                else:
                    outgoing[tensor, rank, :, rows] = part
                continue
            for mine, region in regions:
                start, stop = max(rows.start, mine.start), min(rows.stop, mine.stop)
                if start < stop:
                    target = slice(region.start + start - mine.start, region.start + stop - mine.start)
                    received[tensor, :, target] = part[:, start - rows.start : stop - rows.start]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring pairs of x (B, L, H, D) by tables (L, D / 2); in float32, returned in x's type."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


if triton is not None:

    @triton.jit
    def _place_kernel(
        x,
        x_row,
        x_batch,
        q_scale,
        k_scale,
        cos,
        sin,
        received,
        outgoing,
        peers,
        rows,
        first_row,
        local,
        local_text,
        gathered,
        text_target,
        image_target,
        batch,
        position,
        ulysses,
        first_tensor,
        HEADS: tl.constexpr,
        LOCAL_HEADS: tl.constexpr,
        D: tl.constexpr,
        PITCH: tl.constexpr,
        DIRECT: tl.constexpr,
        INTEGER: tl.constexpr,
        HARDWARE: tl.constexpr,
        NORMED: tl.constexpr,
        ROTATED: tl.constexpr,
        ROWS: tl.constexpr,
        eps: tl.constexpr,
    ):
        # One program: ROWS rows of one head of one tensor of one batch item.
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        head = tl.program_id(1)
        item = (tl.program_id(2) % batch).to(tl.int64)
        index = tl.program_id(2) // batch
        tensor = first_tensor + index
        inside = (row < rows)[:, None]
        column = tl.arange(0, D)[None, :]
        source = x + item * x_batch + row[:, None].to(tl.int64) * x_row + (index * HEADS + head) * D + column
        value = tl.load(source, mask=inside, other=0.0)
        if NORMED:
            if tensor < 2:
                weight = tl.load((q_scale if tensor == 0 else k_scale) + column).to(tl.float32)
                wide = value.to(tl.float32)
                mean_square = tl.sum(wide * wide, axis=1) / D
                # Rounded where the separate operations would round, so that kernel and reference agree to the bit or
                # nearly.
                value = (wide * tl.rsqrt(mean_square + eps)[:, None] * weight).to(value.dtype)
                if ROTATED:
                    half = tl.arange(0, D // 2)[None, :]
                    c = tl.load(cos + row[:, None] * (D // 2) + half, mask=inside, other=0.0)
                    s = tl.load(sin + row[:, None] * (D // 2) + half, mask=inside, other=0.0)
                    even, odd = tl.split(tl.reshape(value.to(tl.float32), (ROWS, D // 2, 2)))
                    turned = tl.join(even * c - odd * s, even * s + odd * c)
                    value = tl.reshape(turned, (ROWS, D)).to(value.dtype)
        rank = head // LOCAL_HEADS
        slot = head % LOCAL_HEADS
        local_row = first_row + row
        # Of what is gathered a rank's rows are at the same place on all ranks.
        target = tl.where(local_row < local_text, text_target + local_row, image_target + local_row)
        place = ((tensor * batch + item).to(tl.int64) * gathered) * LOCAL_HEADS * D
        place += (target[:, None].to(tl.int64) * LOCAL_HEADS + slot) * D + column
        if DIRECT:
            there = tl.multiple_of(tl.load(peers + rank).to(tl.pointer_type(received.dtype.element_ty)), 16)
            tl.store(there + place, value, mask=inside)
        elif rank == position:
            tl.store(received + place, value, mask=inside)
        else:
            leaving = ((tensor * ulysses + rank) * batch + item).to(tl.int64) * local + local_row[:, None]
            if PITCH == 0:
                tl.store(outgoing + (leaving * LOCAL_HEADS + slot) * D + column, value, mask=inside)
            else:
                store_packed(outgoing + leaving * PITCH, value, slot, inside, LOCAL_HEADS, D, INTEGER, HARDWARE)


def _launch(projected, scales, rope, which, first_row, received, outgoing, position, regions, eps, peers) -> None:
    batch, rows = projected.shape[:2]
    d = received.shape[-1]
    heads = projected.shape[2] // (len(scales) * d)
    first = which.indices(3)[0]
    q_scale, k_scale = ({first + i: s for i, s in enumerate(scales)}.get(t) for t in (0, 1))
    some = next((s for s in scales if s is not None), projected)  # in the place of what is not read
    assert projected.stride(2) == 1 and received.is_contiguous() and outgoing.is_contiguous()
    (text_rows, text_region), (image_rows, image_region) = regions
    rows_per_program = 32
    _place_kernel[(triton.cdiv(rows, rows_per_program), heads, batch * len(scales))](
        projected,
        projected.stride(1),
        projected.stride(0),
        some if q_scale is None else q_scale,
        some if k_scale is None else k_scale,
        *((some, some) if rope is None else rope),
        received,
        outgoing,
        outgoing if peers is None else peers,
        rows,
        first_row,
        outgoing.shape[3],
        text_rows.stop,
        received.shape[2],
        text_region.start,
        image_region.start - image_rows.start,
        batch,
        position,
        outgoing.shape[1],
        first,
        HEADS=heads,
        LOCAL_HEADS=received.shape[3],
        D=d,
        PITCH=outgoing.shape[4] if outgoing.dtype in eight_bits.LARGEST else 0,
        DIRECT=peers is not None,
        INTEGER=outgoing.dtype == torch.int8,
        HARDWARE=eight_bits.has_e4m3(outgoing.device),
        NORMED=any(s is not None for s in scales),
        ROTATED=rope is not None,
        ROWS=rows_per_program,
        eps=eps,
        num_warps=4,
    )
