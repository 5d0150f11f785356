"""Rows in 8 bits for the wire: codes with one float32 scale per (token, head), both in the same row.

A packed row holds a token's h heads: h D codes, then h scales, padded to a multiple of 16 bytes. Its tensor's type says
what the codes are: uint8 holds e4m3 (largest value 448), int8 integers (127). scale = amax / largest over the head,
code = round_to_nearest_even(x / scale): the largest value of a head is met exactly, and what was packed and unpacked
packs to the same bytes again. On normally distributed values the relative error of e4m3 is 2.6 %, of integers 0.65 %;
where one value in a head is far above the others, e4m3 keeps more of the rest. A head that is not finite arrives as
NaN, whole; one of values below 5e-36 as zeros.

Values are multiplied with the inverse of their scale, which is rounded correctly, so that the bits are the reference's.
GPUs before Hopper have no instruction that rounds to e4m3, or on Ada one by way of float16, which rounds twice: there
the kernels round with integer arithmetic, to the same bits.
"""

import functools

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


@functools.cache
def has_e4m3(device: torch.device) -> bool:
    """Whether a GPU has an instruction for e4m3 that rounds once."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


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
