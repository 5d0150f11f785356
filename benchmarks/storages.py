"""Weights as in files of fewer bits: rounded to the nearest, by the formats' plain rules."""

import paths  # noqa: F401
import torch

from fastusp_backend.weights.stored import Stored


def _fp8(weight: torch.Tensor) -> Stored:
    return Stored(weight.clamp(-448, 448).to(torch.float8_e4m3fn))


def _q8_0(weight: torch.Tensor) -> Stored:
    blocks = weight.float().unflatten(1, (-1, 32))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks / scales.clamp(min=1e-12)).round().clamp(-127, 127).to(torch.int8)
    return _packed(scales, codes.view(torch.uint8), "Q8_0")


def _q4_0(weight: torch.Tensor) -> Stored:
    blocks = weight.float().unflatten(1, (-1, 32))
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scales = extreme / -8
    codes = (blocks / torch.where(scales == 0, 1.0, scales) + 8).round().clamp(0, 15).to(torch.uint8)
    return _packed(scales, codes[..., :16] | codes[..., 16:] << 4, "Q4_0")


def _packed(scales: torch.Tensor, codes: torch.Tensor, packing: str) -> Stored:
    halves = scales.half().contiguous().view(torch.uint8)
    return Stored(torch.cat([halves, codes], dim=-1).flatten(1), None, packing)


STORAGES = {"fp8": _fp8, "Q8_0": _q8_0, "Q4_0": _q4_0}
"""Format -> function from a weight (rows, columns) to its stored form."""
