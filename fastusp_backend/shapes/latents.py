"""Pictures as latents of 16 channels at an eighth of the size, by a fixed linear basis: FLUX's form without a VAE.

Each 8 x 8 block of pixels is transformed by the discrete cosine transform (type II, orthonormal), of which the lowest
frequencies are kept: 8 of brightness and 4 of each of two differences of colours. Encoding what was decoded gives the
same latents; decoding what was encoded gives the picture without its highest frequencies.
"""

import math

import torch

BLOCK = 8
_FREQUENCIES = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1))
_KEPT = (8, 4, 4)
_COLOURS = (
    (1 / math.sqrt(3), 1 / math.sqrt(3), 1 / math.sqrt(3)),
    (1 / math.sqrt(2), 0.0, -1 / math.sqrt(2)),
    (1 / math.sqrt(6), -2 / math.sqrt(6), 1 / math.sqrt(6)),
)
"""Brightness and two differences of red, green and blue: orthonormal."""
_SCALES = (6.0, 1.0, 1.0, 0.6, 0.6, 0.6, 0.5, 0.5, 2.0, 0.6, 0.6, 0.5, 1.3, 0.4, 0.4, 0.3)
"""What each channel is divided by: values of about one where it is not even, brightness somewhat more."""


def encode(pictures: torch.Tensor) -> torch.Tensor:
    """pictures (B, 3, h, w) from 0 to 1, h and w multiples of 8 -> latents (B, 16, h / 8, w / 8)."""
    blocks = (2 * pictures - 1).unflatten(-1, (-1, BLOCK)).unflatten(2, (-1, BLOCK))  # B 3 H 8 W 8
    return torch.einsum("kcyx,bchywx->bkhw", _basis(pictures), blocks)


def decode(latents: torch.Tensor) -> torch.Tensor:
    """latents (B, 16, h, w) -> pictures (B, 3, 8 h, 8 w) from 0 to 1."""
    scales = latents.new_tensor(_SCALES)
    blocks = torch.einsum("kcyx,bkhw->bchywx", _basis(latents) * scales.square()[:, None, None, None], latents)
    return ((blocks.flatten(4, 5).flatten(2, 3) + 1) / 2).clamp(0, 1)


def preview_factors() -> list[list[float]]:
    """(16, 3): what each channel gives to a block's mean red, green and blue, from -1 to 1. Of most channels' patterns
    the mean is zero: only the lowest frequency of brightness and of each difference of colours has any."""
    means = _basis(torch.empty(0, dtype=torch.float64)).mean((2, 3))
    return (means * torch.tensor(_SCALES, dtype=torch.float64).square()[:, None]).tolist()


def _basis(like: torch.Tensor) -> torch.Tensor:
    """(16, 3, 8, 8): each channel's pattern, by its scale."""
    position = (torch.arange(BLOCK, dtype=torch.float64) + 0.5) * math.pi / BLOCK
    rows = torch.stack([torch.cos(n * position) * math.sqrt((1 if n == 0 else 2) / BLOCK) for n in range(3)])
    patterns = [
        torch.einsum("c,y,x->cyx", torch.tensor(colour, dtype=torch.float64), rows[v], rows[u])
        for colour, kept in zip(_COLOURS, _KEPT, strict=True)
        for v, u in _FREQUENCIES[:kept]
    ]
    scales = torch.tensor(_SCALES, dtype=torch.float64)
    return (torch.stack(patterns) / scales[:, None, None, None]).to(like)
