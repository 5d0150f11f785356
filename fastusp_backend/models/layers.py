"""What blocks of all families are made of: weights in their storage type, arithmetic in the type of the activations.

Shapes: B batch, L tokens, C hidden.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.fp8_product import Quantised, product
from ..weights.stored import Stored
from .biased_product import biased_product

Activations = torch.Tensor | Quantised


class Linear(nn.Module):
    """y = x W^T + b, or without b. W and b are converted to x's type where they are stored in another (see stored.py);
    where x is quantised, the product is one in fp8, which takes a weight with a scale per row.

    weight, scale, packing: W, see `Stored`.
    up, down: what LoRAs add to a packed weight.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        for name in ("scale", "up", "down"):
            self.register_buffer(name, None, persistent=False)
        self.packing = ""

    @property
    def out_features(self) -> int:
        return len(self.weight)

    @property
    def stored(self) -> Stored:
        """The weight as it lies in memory."""
        return Stored(self.weight, self.scale, self.packing, self.low_rank)

    @stored.setter
    def stored(self, stored: Stored) -> None:
        self.weight = nn.Parameter(stored.data, requires_grad=False)
        self.scale, self.packing, self.low_rank = stored.scale, stored.packing, stored.low_rank

    @property
    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See `Stored`."""
        return None if self.up is None else (self.up, self.down)

    @low_rank.setter
    def low_rank(self, factors: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        self.up, self.down = factors or (None, None)

    def forward(
        self,
        x: Activations,
        rows: slice = slice(None),
        columns: slice = slice(None),
        *,
        bias: bool = True,
    ) -> torch.Tensor:
        """x (..., K) -> (..., N).

        rows: the outputs that are computed, where a fused projection is run part by part.
        columns: the inputs that x has, where these are not all.
        bias: whether b is added.
        """
        offset = self.bias[rows].to(x.dtype) if bias and self.bias is not None else None
        if isinstance(x, Quantised):
            return product(x, self.weight[rows, columns], self.scale[rows], offset)
        weight = self.stored.values(x.dtype, rows, columns)
        return F.linear(x, weight) if offset is None else biased_product(x, weight, offset)

    def add_to(self, out: torch.Tensor, x: Activations, columns: slice) -> torch.Tensor:
        """out (B, L, N) + x W^T for some columns of W, in out's memory where that is possible."""
        if isinstance(x, Quantised):
            return out.add_(self(x, columns=columns, bias=False))
        weight = self.stored.values(x.dtype, columns=columns)
        return out.flatten(0, 1).addmm_(x.flatten(0, 1), weight.t()).view_as(out)

    def rows(self, rows: slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias, which the layer must have, of some outputs, in `dtype`."""
        return self.stored.values(dtype, rows), self.bias[rows].to(dtype)


class HeadNorm(nn.Module):
    """The learnt scale of an RMS norm over the head dim (FLUX's QKNorm); kernels/place.py applies it."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(dim), requires_grad=False)


class RMSNorm(nn.Module):
    """x / rms(x) times a learnt weight, over the last dimension. Where it is a head's, kernels/place.py applies it, and
    where it lies between residual additions kernels/sandwich.py may."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=self.eps)


class ModulationOut(NamedTuple):
    """The modulations around attention or an MLP, each (B, n, C), n rows: those of the norm before it, and the gate of
    what it gives."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor


class StreamModulation(NamedTuple):
    """One stream's modulations in a block."""

    attention: ModulationOut
    mlp: ModulationOut

    @classmethod
    def of(cls, parts: Sequence[torch.Tensor]) -> "StreamModulation":
        """Groups a layer's six outputs, of which attention's come first."""
        return cls(ModulationOut(*parts[:3]), ModulationOut(*parts[3:]))


def timestep_embedding(
    t: torch.Tensor, dim: int, *, max_period: float = 10_000.0, factor: float = 1000.0
) -> torch.Tensor:
    """Sinusoids of `factor` t, a product in t's type: t (B,) -> (B, dim) float32, cosines first (Vaswani et al., as
    BFL's FLUX has them)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(max_period) * exponents / half)
    angles = (factor * t).float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_tables(ids: torch.Tensor, axes: tuple[int, ...], theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables for positions ids (L, len(axes)): cos and sin (L, sum(axes) / 2), float32, computed in float64."""
    angles = []
    for axis, dim in enumerate(axes):
        steps = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
        angles.append(ids[:, axis].double()[:, None] * theta**-steps)
    table = torch.cat(angles, dim=-1)
    return table.cos().float(), table.sin().float()
