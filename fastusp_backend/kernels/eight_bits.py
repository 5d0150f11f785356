"""Rows in 8 bits for the wire: codes with one float32 scale per (token, head), both in the same row.

A packed row holds a token's h heads: h D codes, then h scales, padded to a multiple of 16 bytes. Its tensor's type says
what the codes are: uint8 holds e4m3 (largest value 448), int8 integers (127). scale = amax / largest over the head,
code = round_to_nearest_even(x / scale): the largest value of a head is met exactly, and what was packed and unpacked
packs to the same bytes again. On normally distributed values the relative error of e4m3 is 2.6 %, of integers 0.65 %;
where one value in a head is far above the others, e4m3 keeps more of the rest. A head that is not finite arrives as
NaN, whole; one of values below 5e-36 as zeros.

Values are multiplied with the inverse of their scale, which is rounded correctly, so that the bits are the reference's.
GPUs before Ada have no e4m3 instructions: there the kernels round with integer arithmetic, to the same bits.
"""

import functools
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings no Triton
    triton = None

LARGEST = {torch.uint8: 448.0, torch.int8: 127.0}
_ROWS = 32


def pitch(heads: int, dim: int) -> int:
    """Bytes of a packed row."""
    return -(-heads * (dim + 4) // 16) * 16


def pack(x: torch.Tensor, out: torch.Tensor) -> None:
    """x (B, R, h, D), any strides but the last, into out (B, R, pitch) uint8 or int8."""
    if x.is_cuda and triton is not None:
        _launch_pack(x, out)
    else:
        pack_reference(x, out)


def pack_reference(x: torch.Tensor, out: torch.Tensor) -> None:
    """The same in plain torch."""
    heads, dim = x.shape[-2:]
    values, scales = quantise(x, out.dtype)
    out[..., : heads * dim] = values.flatten(-2).view(out.dtype)
    out[..., heads * dim : heads * (dim + 4)] = scales.contiguous().view(out.dtype)


def quantise(x: torch.Tensor, carrier: torch.dtype = torch.uint8) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., D) -> values (..., D), e4m3 or int8, and float32 scales (...): x is about values * scales[..., None]."""
    wide, limit = x.float(), LARGEST[carrier]
    largest = wide.abs().amax(-1)
    scales = largest / torch.full_like(largest, limit)  # by a number, GPUs multiply with its rounded inverse
    # Below this, an inverse may be infinite.
    inverses = torch.where(scales >= torch.finfo(torch.float32).tiny, scales, 1.0).reciprocal()
    scaled = (wide * inverses[..., None]).clamp(-limit, limit)
    return scaled.round().to(torch.int8) if carrier == torch.int8 else scaled.to(torch.float8_e4m3fn), scales


class Destination(NamedTuple):
    """Where unpacked rows go.

    text: how many of a source's rows are text; row l < text of source s goes to row s text_step + l.
    text_step: rows from one source's text to the next one's.
    image_start, image_step: any other row goes to row image_start + s image_step + (l - text).
    head_step: the heads of source s go to those from s head_step on.
    skipped: a source whose rows stay where they are; -1 for none.
    """

    text: int
    text_step: int
    image_start: int
    image_step: int
    head_step: int = 0
    skipped: int = -1


def unpack(packed: torch.Tensor, out: torch.Tensor, to: Destination) -> None:
    """packed (T, S, B, L, pitch) of S sources into out (T, B, N, H, D), contiguous."""
    if packed.is_cuda and triton is not None:
        _launch_unpack(packed, out, to)
    else:
        unpack_reference(packed, out, to)


def unpack_reference(packed: torch.Tensor, out: torch.Tensor, to: Destination) -> None:
    """The same in plain torch."""
    dim, local = out.shape[-1], packed.shape[3]
    heads = _heads(packed, out, to)
    kind = torch.int8 if packed.dtype == torch.int8 else torch.float8_e4m3fn
    values = packed[..., : heads * dim].contiguous().view(kind).unflatten(-1, (heads, dim))
    scales = packed[..., heads * dim : heads * (dim + 4)].contiguous().view(torch.float32)
    wide = (values.float() * scales[..., None]).to(out.dtype)
    for source in range(packed.shape[1]):
        if source == to.skipped:
            continue
        columns = slice(source * to.head_step, source * to.head_step + heads)
        text, image = source * to.text_step, to.image_start + source * to.image_step
        out[:, :, text : text + to.text, columns] = wide[:, source, :, : to.text]
        out[:, :, image : image + local - to.text, columns] = wide[:, source, :, to.text :]


@functools.cache
def has_e4m3(device: torch.device) -> bool:
    """Whether a GPU has instructions for e4m3."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _heads(packed: torch.Tensor, out: torch.Tensor, to: Destination) -> int:
    """Heads of a packed row: all of out's, unless each source brings its own."""
    return to.head_step or out.shape[3]


if triton is not None:

    @triton.jit
    def encode(y, HARDWARE: tl.constexpr):
        """float32 in [-448, 448] to the bits of e4m3, rounded to nearest even."""
        if HARDWARE:
            code = y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            bits = y.to(tl.int32, bitcast=True)
            magnitude = bits & 0x7FFFFFFF
            normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960  # exponent bias 127 to 7
            # Below 2^-6 values are multiples of 2^-9, the spacing of float32 above 2^14: adding that rounds to them.
            size = magnitude.to(tl.float32, bitcast=True)
            small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
            code = (tl.where(size < 0.015625, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)
        return code

    @triton.jit
    def round_to_integer(y):
        """float32 of up to 2^21 in size to int32, to nearest even: above 1.5 x 2^23 the spacing of float32 is 1."""
        return (y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000

    @triton.jit
    def decode(code, HARDWARE: tl.constexpr):
        """The bits of e4m3 to float32."""
        if HARDWARE:
            value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            bits = code.to(tl.int32)
            size = bits & 0x7F
            normal = ((size << 20) + 0x3C000000).to(tl.float32, bitcast=True)
            value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
            value = tl.where(bits >= 0x80, -value, value)
        return value

    @triton.jit
    def magnitudes(x):
        """|x|, infinite for NaN: the maximum of a GPU, unlike torch's, passes NaN over."""
        return tl.where(x == x, tl.abs(x), float("inf"))

    @triton.jit
    def store_packed(
        base, value, slot, inside, HEADS: tl.constexpr, D: tl.constexpr, INTEGER: tl.constexpr, HARDWARE: tl.constexpr
    ):
        """Quantises value (R, D), rows of head `slot`, into the packed rows at base (R, 1), pointers to bytes."""
        limit: tl.constexpr = 127.0 if INTEGER else 448.0
        wide = value.to(tl.float32)
        # Correctly rounded divisions, one for each row: the bits must be those of the reference.
        largest = tl.max(magnitudes(wide), axis=1)
        scale = tl.div_rn(largest, tl.full(largest.shape, limit, tl.float32))[:, None]
        scale = tl.where(scale < float("inf"), scale, float("nan"))
        divisor = tl.where(scale >= 1.1754943508222875e-38, scale, 1.0)
        scaled = wide * tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
        scaled = tl.minimum(tl.maximum(scaled, -limit), limit)
        place = base + slot * D + tl.arange(0, D)[None, :]
        if INTEGER:
            tl.store(place, round_to_integer(scaled).to(tl.int8), mask=inside)
        else:
            tl.store(place, encode(scaled, HARDWARE), mask=inside)
        tl.store((base + HEADS * D + slot * 4).to(tl.pointer_type(tl.float32)), scale, mask=inside)

    @triton.jit
    def _pack_kernel(
        x,
        x_batch,
        x_row,
        x_head,
        out,
        rows,
        PITCH: tl.constexpr,
        HEADS: tl.constexpr,
        D: tl.constexpr,
        INTEGER: tl.constexpr,
        HARDWARE: tl.constexpr,
        R: tl.constexpr,
    ):
        # One program: R rows of one head of one batch item.
        row = tl.program_id(0) * R + tl.arange(0, R)
        head = tl.program_id(1)
        item = tl.program_id(2).to(tl.int64)
        inside = (row < rows)[:, None]
        wide_row = row[:, None].to(tl.int64)
        value = tl.load(
            x + item * x_batch + wide_row * x_row + head * x_head + tl.arange(0, D)[None, :], mask=inside, other=0.0
        )
        store_packed(out + (item * rows + wide_row) * PITCH, value, head, inside, HEADS, D, INTEGER, HARDWARE)

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
        if source != skipped:
            base = packed + (tl.program_id(2).to(tl.int64) * local + row[:, None]) * PITCH
            code = tl.load(base + head * D + column, mask=inside, other=0)
            scale = tl.load((base + HEADS * D + head * 4).to(tl.pointer_type(tl.float32)), mask=inside, other=0.0)
            target = tl.where(row < text, source * text_step + row, image_start + source * image_step + row - text)
            place = out + ((tensor * batch + item).to(tl.int64) * gathered + target[:, None]) * ALL_HEADS * D
            place += (source * head_step + head) * D + column
            value = code.to(tl.float32) if INTEGER else decode(code, HARDWARE)
            tl.store(place, (value * scale).to(out.dtype.element_ty), mask=inside)


def _launch_pack(x: torch.Tensor, out: torch.Tensor) -> None:
    batch, rows, heads, dim = x.shape
    assert x.stride(3) == 1 and out.is_contiguous() and out.shape == (batch, rows, pitch(heads, dim))
    _pack_kernel[(triton.cdiv(rows, _ROWS), heads, batch)](
        x,
        x.stride(0),
        x.stride(1),
        x.stride(2),
        out,
        rows,
        PITCH=out.shape[2],
        HEADS=heads,
        D=dim,
        INTEGER=out.dtype == torch.int8,
        HARDWARE=has_e4m3(out.device),
        R=_ROWS,
    )


def _launch_unpack(packed: torch.Tensor, out: torch.Tensor, to: Destination) -> None:
    tensors, sources, batch, local, row_bytes = packed.shape
    heads, dim = _heads(packed, out, to), out.shape[4]
    assert packed.is_contiguous() and out.is_contiguous() and row_bytes == pitch(heads, dim)
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
        PITCH=row_bytes,
        HEADS=heads,
        ALL_HEADS=out.shape[3],
        D=dim,
        INTEGER=packed.dtype == torch.int8,
        HARDWARE=has_e4m3(out.device),
        R=_ROWS,
    )
