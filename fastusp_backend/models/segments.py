"""The element-wise segments between matrix products and exchanges: pure functions, compiled once for all blocks.

Weights and modulations are arguments and the token dimension is dynamic, so that neither another block nor another
image size compiles anything. The compiler never sees a collective.

Shapes: x, y (B, L, C); shift, scale, gate (B, 1, C).
"""

import functools

import torch
import torch.nn.functional as F


def _norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def _bounded(x: torch.Tensor) -> torch.Tensor:
    """Keeps a float16 residual stream finite; other types pass through."""
    return torch.nan_to_num(x, nan=0.0, posinf=65504.0, neginf=-65504.0) if x.dtype == torch.float16 else x


def _add(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return _bounded(torch.addcmul(x, gate, y))


def _add_norm(x, y, gate, shift, scale) -> tuple[torch.Tensor, torch.Tensor]:
    x = _add(x, y, gate)
    return x, _norm(x, shift, scale)


class Segments:
    """norm: adaLN, (1 + scale) layer_norm(x) + shift. add: x + gate y. add_norm: both, returning (x, normed)."""

    def __init__(self, *, compiled: bool):
        wrap = _compiled if compiled else (lambda function: function)
        self.norm, self.add, self.add_norm = wrap(_norm), wrap(_add), wrap(_add_norm)


def _compiled(function):
    fast = torch.compile(function, fullgraph=True)

    @functools.wraps(function)
    def call(*tensors: torch.Tensor):
        for tensor in tensors:
            if tensor.shape[1] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return fast(*tensors)

    return call


def gelu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu_tanh(x W^T + b); on GPUs the library applies it as the product's epilogue."""
    if x.is_cuda and x.dtype != torch.float32:
        flat = torch.ops.aten._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return flat.unflatten(0, x.shape[:-1])
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")
