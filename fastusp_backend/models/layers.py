"""Building blocks: weights in their storage type, arithmetic in the type of the activations."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    """y = x W^T + b, with W and b converted to x's type where they are stored in another."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class HeadNorm(nn.Module):
    """RMS norm over the head dim with a learnt scale (FLUX's QKNorm)."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale.to(x.dtype), eps=1e-6)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """adaLN: layer norm without affine, then (1 + scale) x + shift. x (B, L, C); shift, scale (B, 1, C)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def timestep_embedding(
    t: torch.Tensor, dim: int, *, max_period: float = 10_000.0, factor: float = 1000.0
) -> torch.Tensor:
    """Sinusoids of `factor` t: t (B,) -> (B, dim) float32, cosines first (Vaswani et al., as BFL's FLUX has them)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(max_period) * exponents / half)
    angles = (factor * t.float())[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_tables(ids: torch.Tensor, axes: tuple[int, ...], theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables for positions ids (L, len(axes)): cos and sin (L, sum(axes) / 2), float32, computed in float64."""
    angles = []
    for axis, dim in enumerate(axes):
        steps = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
        angles.append(ids[:, axis].double()[:, None] * theta**-steps)
    table = torch.cat(angles, dim=-1)
    return table.cos().float(), table.sin().float()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring pairs of x (B, L, H, D) by tables (L, D / 2); in float32, returned in x's type."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def bounded(x: torch.Tensor) -> torch.Tensor:
    """Keeps a float16 residual stream finite; other types pass through."""
    return torch.nan_to_num(x, nan=0.0, posinf=65504.0, neginf=-65504.0) if x.dtype == torch.float16 else x
