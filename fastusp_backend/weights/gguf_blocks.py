"""GGUF's block formats: weights stay packed in memory. GPUs unpack them by a kernel, of which this is the reference.

A row of a matrix is blocks of 32 or 256 values; a block is some bytes: float16 scales (d) and minima (m), small integer
scales per sub-block, and quants of 2 to 8 bits. Layouts: github.com/ggml-org/ggml, src/ggml-common.h; the order of
operations is the reference's (src/ggml-quants.c), so that values are bit-equal to its float32.

Below, a function takes blocks (N, bytes) uint8 and gives (N, values) float32.
"""

import torch

from .packing_type import Packing


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at byte `start`, (N, 1) float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _bits(data: torch.Tensor, width: int) -> torch.Tensor:
    """data (N, n) -> (N, 8 / width, n): `width` bits of every byte after the other, the lowest first."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=data.device)[:, None]
    return (data[:, None] >> shifts) & ((1 << width) - 1)


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """data (N, n) -> (N, 2 n): the low halves of all bytes, then the high ones."""
    return _bits(data, 4).flatten(1)


def _fifth_bits(data: torch.Tensor) -> torch.Tensor:
    """data (N, 4), 32 bits -> (N, 32) of 0 or 16."""
    return _bits(data, 1).transpose(1, 2).flatten(1) << 4


def _q8_0(b):
    return b[:, 2:].view(torch.int8).float() * _half(b, 0)


def _q4_0(b):
    return (_nibbles(b[:, 2:]).to(torch.int8) - 8).float() * _half(b, 0)


def _q4_1(b):
    return _nibbles(b[:, 4:]).float() * _half(b, 0) + _half(b, 2)


def _q5_0(b):
    quants = _nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])
    return (quants.to(torch.int8) - 16).float() * _half(b, 0)


def _q5_1(b):
    quants = _nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])
    return quants.float() * _half(b, 0) + _half(b, 2)


def _sub_scales(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """data (N, 12) -> the 6-bit scales and minima of 8 sub-blocks, (N, 8, 1) float32: the last four of each have their
    low bits in the last four bytes and their high ones above the first eight bytes' own."""
    d, m, low = data.unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat([d & 63, (low & 15) | ((d >> 2) & 48)], dim=1)
    minima = torch.cat([m & 63, (low >> 4) | ((m >> 2) & 48)], dim=1)
    return scales[..., None].float(), minima[..., None].float()


def _q4_k(b):
    scales, minima = _sub_scales(b[:, 4:16])
    quants = _bits(b[:, 16:].reshape(-1, 32), 4).reshape(len(b), 8, 32).float()
    return (_half(b, 0)[..., None] * scales * quants - _half(b, 2)[..., None] * minima).flatten(1)


def _q5_k(b):
    scales, minima = _sub_scales(b[:, 4:16])
    quants = _bits(b[:, 48:].reshape(-1, 32), 4).reshape(len(b), 8, 32)
    quants = (quants | (_bits(b[:, 16:48], 1) << 4)).float()
    return (_half(b, 0)[..., None] * scales * quants - _half(b, 2)[..., None] * minima).flatten(1)


def _q6_k(b):
    low = _bits(b[:, :128].reshape(-1, 64), 4).reshape(len(b), 8, 32)
    high = _bits(b[:, 128:192].reshape(-1, 32), 2).reshape(len(b), 8, 32)
    quants = ((low | (high << 4)).to(torch.int8) - 32).reshape(len(b), 16, 16).float()
    scales = b[:, 192:208].view(torch.int8).float()
    return (_half(b, 208) * scales)[..., None].mul(quants).flatten(1)


def _q3_k(b):
    low = _bits(b[:, 32:96].reshape(-1, 32), 2).reshape(len(b), 16, 16)
    high = _bits(b[:, :32], 1).reshape(len(b), 16, 16)
    quants = (low.to(torch.int8) - ((high ^ 1) << 2).to(torch.int8)).float()
    first, last = b[:, 96:104], b[:, 104:108]
    scales = _nibbles(first) | (_bits(last, 2).flatten(1) << 4)
    scales = (scales.to(torch.int8) - 32).float()
    return (_half(b, 108) * scales)[..., None].mul(quants).flatten(1)


def _q2_k(b):
    quants = _bits(b[:, 16:80].reshape(-1, 32), 2).reshape(len(b), 16, 16).float()
    scales, minima = (b[:, :16] & 15).float(), (b[:, :16] >> 4).float()
    return ((_half(b, 80) * scales)[..., None] * quants - (_half(b, 82) * minima)[..., None]).flatten(1)


BLOCKS = {
    "Q8_0": Packing(32, 34, _q8_0),
    "Q4_0": Packing(32, 18, _q4_0),
    "Q4_1": Packing(32, 20, _q4_1),
    "Q5_0": Packing(32, 22, _q5_0),
    "Q5_1": Packing(32, 24, _q5_1),
    "Q2_K": Packing(256, 84, _q2_k),
    "Q3_K": Packing(256, 110, _q3_k),
    "Q4_K": Packing(256, 144, _q4_k),
    "Q5_K": Packing(256, 176, _q5_k),
    "Q6_K": Packing(256, 210, _q6_k),
}
"""By GGUF's names."""
