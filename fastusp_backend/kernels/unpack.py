"""Rows in 8 bits (eight_bits.py) to where their values are read."""

from typing import NamedTuple

import torch

from .eight_bits import has_e4m3, pitch

try:
    import triton
    import triton.language as tl

    from .eight_bits import decode
except ImportError:  # a CPU build of torch brings no Triton
    triton = None

_ROWS = 32


class Destination(NamedTuple):
    """Where unpacked rows go.

    text: how many of a source's rows are text; row l < text of source s goes to row s text_step + l.
    text_step: rows from one source's text to the next one's.
    image_start, image_step: any other row goes to row image_start + s image_step + (l - text).
    head_step: the heads of source s go to those from s head_step on.
    skipped: a source whose rows are not read here; -1 for none.
    """

    text: int
    text_step: int
    image_start: int
    image_step: int
    head_step: int = 0
    skipped: int = -1


class Own(NamedTuple):
    """Rows that were never packed, in the place of the skipped source's.

    values: (B, N', h, D), contiguous, of the type of what is unpacked.
    text_start, image_start: where the rows lie there that are text, and the others.
    """

    values: torch.Tensor
    text_start: int
    image_start: int


def unpack(packed: torch.Tensor, out: torch.Tensor, to: Destination, own: Own | None = None) -> None:
    """packed (T, S, B, L, pitch) of S sources into out (T, B, N, H, D), contiguous. own: for T = 1."""
    if packed.is_cuda and triton is not None:
        _launch_unpack(packed, out, to, own)
    else:
        unpack_reference(packed, out, to, own)


def unpack_reference(packed: torch.Tensor, out: torch.Tensor, to: Destination, own: Own | None = None) -> None:
    """The same in plain torch."""
    dim, local = out.shape[-1], packed.shape[3]
    heads = _heads(packed, out, to)
    kind = torch.int8 if packed.dtype == torch.int8 else torch.float8_e4m3fn
    values = packed[..., : heads * dim].contiguous().view(kind).unflatten(-1, (heads, dim))
    scales = packed[..., heads * dim : heads * (dim + 4)].contiguous().view(torch.float32)
    wide = (values.float() * scales[..., None]).to(out.dtype)
    for source in range(packed.shape[1]):
        texts, images = wide[:, source, :, : to.text], wide[:, source, :, to.text :]
        if source == to.skipped:
            if own is None:
                continue
            texts = own.values[None, :, own.text_start :][:, :, : to.text]
            images = own.values[None, :, own.image_start :][:, :, : local - to.text]
        columns = slice(source * to.head_step, source * to.head_step + heads)
        text, image = source * to.text_step, to.image_start + source * to.image_step
        out[:, :, text : text + to.text, columns] = texts
        out[:, :, image : image + local - to.text, columns] = images


def _heads(packed: torch.Tensor, out: torch.Tensor, to: Destination) -> int:
    """Heads of a packed row: all of out's, unless each source brings its own."""
    return to.head_step or out.shape[3]


if triton is not None:

    @triton.jit
    def _unpack_kernel(
        packed,
        out,
        sources,
        batch,
        local,
        gathered,
        text,
        text_step,
        image_start,
        image_step,
        head_step,
        skipped,
        own,
        own_rows,
        own_text,
        own_image,
        OWN: tl.constexpr,
        PITCH: tl.constexpr,
        HEADS: tl.constexpr,
        ALL_HEADS: tl.constexpr,
        D: tl.constexpr,
        INTEGER: tl.constexpr,
        HARDWARE: tl.constexpr,
        R: tl.constexpr,
    ):
        # One program: R rows of one head of one (tensor, source, batch item).
        row = tl.program_id(0) * R + tl.arange(0, R)
        head = tl.program_id(1)
        item = tl.program_id(2) % batch
        source = (tl.program_id(2) // batch) % sources
        tensor = tl.program_id(2) // (batch * sources)
        inside = (row < local)[:, None]
        column = tl.arange(0, D)[None, :]
        target = tl.where(row < text, source * text_step + row, image_start + source * image_step + row - text)
        place = out + ((tensor * batch + item).to(tl.int64) * gathered + target[:, None]) * ALL_HEADS * D
        place += (source * head_step + head) * D + column
        if source != skipped:
            base = packed + (tl.program_id(2).to(tl.int64) * local + row[:, None]) * PITCH
            code = tl.load(base + head * D + column, mask=inside, other=0)
            scale = tl.load((base + HEADS * D + head * 4).to(tl.pointer_type(tl.float32)), mask=inside, other=0.0)
            value = code.to(tl.float32) if INTEGER else decode(code, HARDWARE)
            tl.store(place, (value * scale).to(out.dtype.element_ty), mask=inside)
        elif OWN:
            lies = tl.where(row < text, own_text + row, own_image + row - text)
            at = own + ((item.to(tl.int64) * own_rows + lies[:, None]) * HEADS + head) * D + column
            tl.store(place, tl.load(at, mask=inside, other=0.0), mask=inside)


def _launch_unpack(packed: torch.Tensor, out: torch.Tensor, to: Destination, own: Own | None) -> None:
    tensors, sources, batch, local, row_bytes = packed.shape
    heads, dim = _heads(packed, out, to), out.shape[4]
    assert packed.is_contiguous() and out.is_contiguous() and row_bytes == pitch(heads, dim)
    if own is not None:
        assert tensors == 1 and own.values.is_contiguous() and own.values.dtype == out.dtype
    _unpack_kernel[(triton.cdiv(local, _ROWS), heads, tensors * sources * batch)](
        packed,
        out,
        sources,
        batch,
        local,
        out.shape[2],
        to.text,
        to.text_step,
        to.image_start,
        to.image_step,
        to.head_step,
        to.skipped,
        *((out, 0, 0, 0) if own is None else (own.values, own.values.shape[1], own.text_start, own.image_start)),
        OWN=own is not None,
        PITCH=row_bytes,
        HEADS=heads,
        ALL_HEADS=out.shape[3],
        D=dim,
        INTEGER=packed.dtype == torch.int8,
        HARDWARE=has_e4m3(out.device),
        R=_ROWS,
    )
