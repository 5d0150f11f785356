"""Products in fp8: activations with a scale per token, weights with a scale per output (row-wise scaling)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

_MIN_CAPABILITY = (8, 9)


class Quantised(NamedTuple):
    """Activations (B, L, K): e4m3 values, float32 scales (B, L, 1), and the type that they were computed in."""

    values: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype


def product(x: Quantised, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b (B, L, N) in x's type: weight (N, K) e4m3, of any row pitch, scales (N, 1) float32.

    GPUs multiply in fp8 and scale the sums; CPU ranks multiply the same values in float32.
    """
    if not x.values.is_cuda:
        wide = F.linear(x.values.float() * x.scales, weight.float() * scales)
        return (wide if bias is None else wide + bias.float()).to(x.dtype)
    flat = torch._scaled_mm(
        x.values.flatten(0, 1),
        weight.t(),
        scale_a=x.scales.flatten(0, 1),
        scale_b=scales.t(),
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=True,
    )
    return flat.unflatten(0, x.values.shape[:2])


def check_fp8_products(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError where products in fp8 cannot run."""
    if device.type != "cuda":
        return
    if torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"linear = 'fp8' needs a GPU of compute capability 8.9 (Ada) or newer, not {name}; use exact")
    if dtype != torch.bfloat16:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"linear = 'fp8' computes in bfloat16, not {kind}; set weight_dtype to bf16, or use exact")
