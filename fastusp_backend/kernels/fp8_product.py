"""Products in fp8: activations with a scale per token, weights with a scale per output (row-wise scaling).

Both sides are e4m3; tensor cores sum their products in float32, and the scales are applied to the sums as they are
written, so that no value is converted to a wider type first. With one scale per tensor, a token with large values would
take precision from all others; scales per block of K would follow outliers within a token as well, but sums must then
be scaled block by block, which torch's product has for few GPUs and versions only.

torch gives no rule for what its row-wise product takes: that differs by GPU, by torch and cuBLAS version, and by shape.
cuBLAS on Hopper refuses a bias where there are few rows (torch 2.11, N = 3072, K = 12288: 35 and less); some torch
versions have no row-wise product for Blackwell, or give it to a cuBLAS that has none. So a product goes another way
where the first is refused: the bias is added afterwards, or the scales too, to a product with one scale per tensor,
which all GPUs with fp8 have. A refusal comes before anything is launched, depends on shapes alone and is remembered, so
that a CUDA graph captures what its first run found.
"""

import functools
import logging
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)

_MIN_CAPABILITY = (8, 9)
_ADA = (8, 9)
_PASSING = ("ALLOC_FAILED", "NOT_INITIALIZED", "EXECUTION_FAILED", "INTERNAL_ERROR")
"""Parts of errors that say nothing of a shape."""
_MULTIPLE = 16
"""What the sizes of a weight must be multiples of, on all GPUs and in all torch versions."""


class Quantised(NamedTuple):
    """Activations in fp8.

    values: (B, L, K) e4m3.
    scales: (B, L, 1) float32, what a token's values are multiplied by.
    dtype: the type that they were computed in, and that a product of them gives.
    """

    values: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype


def product(x: Quantised, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b (B, L, N) in x's type.

    weight: (N, K) e4m3, of any row pitch.
    scales: (N, 1) float32.
    bias: (N,) or None.

    GPUs multiply in fp8 and scale the sums; CPU ranks multiply the same values in float32. N, K and the pitch are
    multiples of 16 on GPUs (see `check_fp8_sizes`); L is any number.
    """
    if not x.values.is_cuda:
        wide = F.linear(x.values.float() * x.scales, weight.float() * scales)
        return (wide if bias is None else wide + bias.float()).to(x.dtype)
    values, rows = x.values.flatten(0, 1).contiguous(), x.scales.flatten(0, 1).contiguous()
    if len(values) == 0:
        return values.new_empty(*x.values.shape[:2], len(weight), dtype=x.dtype)
    return _multiply(values, rows, weight, scales, bias, x.dtype).unflatten(0, x.values.shape[:2])


_refusals: dict[tuple, int] = {}
"""How many of `_WAYS` were refused for products of a shape; those of which none was are not here."""


def _multiply(values, rows, weight, scales, bias, dtype) -> torch.Tensor:
    """values (M, K), rows (M, 1) -> (M, N), the first way of `_WAYS` that is not refused."""
    shape = (len(values), *weight.shape, weight.stride(0), bias is not None, values.device)
    first = _refusals.get(shape, 0 if _has_row_wise(weight) else len(_WAYS) - 1)
    for number, way in enumerate(_WAYS[first:-1], first):
        try:
            return way(values, rows, weight, scales, bias, dtype)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:  # an error that is none of this way's alone comes again in the last
            if any(passing in str(error) for passing in _PASSING):
                raise
            _refusals[shape] = number + 1
            m, n, k = shape[:3]
            reason = str(error).splitlines()[0]
            log.info("fp8 product %d x %d x %d: %s refused (%s)", m, n, k, way.__name__.strip("_"), reason)
    return _WAYS[-1](values, rows, weight, scales, bias, dtype)


def _row_wise(values, rows, weight, scales, bias, dtype) -> torch.Tensor:
    """Scales and bias are applied to the sums as the product writes them."""
    return torch._scaled_mm(
        values, weight.t(), scale_a=rows, scale_b=scales.t(), bias=bias, out_dtype=dtype, use_fast_accum=True
    )


def _bias_after(values, rows, weight, scales, bias, dtype) -> torch.Tensor:
    flat = _row_wise(values, rows, weight, scales, None, dtype)
    return flat if bias is None else flat.add_(bias)


def _all_after(values, rows, weight, scales, bias, dtype) -> torch.Tensor:
    """Without scales the sums are up to 448^2 K, within bfloat16's range; they are rounded to it before and after."""
    one = _one(values.device)
    flat = torch._scaled_mm(values, weight.t(), scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=True)
    flat.mul_(rows)
    return flat.mul_(scales.t()) if bias is None else torch.addcmul(bias, flat, scales.t(), out=flat)


_WAYS = (_row_wise, _bias_after, _all_after)


@functools.cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones((), dtype=torch.float32, device=device)


def _has_row_wise(weight: torch.Tensor) -> bool:
    """Whether torch's row-wise product is right for a weight where it does not refuse it. On Ada it takes rows for
    contiguous, whatever their pitch, and before torch 2.12 it ignores the current stream, so that it cannot be captured
    (pytorch/pytorch#177651)."""
    if _capability(weight.device) != _ADA:
        return True
    return weight.is_contiguous() and _torch_version() >= (2, 12)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _torch_version() -> tuple[int, int]:
    major, minor = str(torch.__version__).split(".")[:2]
    return int(major), int(minor)


def check_fp8_products(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError where products in fp8 cannot run."""
    if device.type != "cuda":
        return
    if torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"set linear = exact: fp8 needs a GPU of compute capability 8.9 (Ada) or newer, not {name}")
    if dtype != torch.bfloat16:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"set weight_dtype to bf16, or linear = exact: fp8 computes in bfloat16, not {kind}")


def check_fp8_sizes(device: torch.device, shapes: Iterable[tuple[int, ...]]) -> None:
    """Raises ValueError where GPUs cannot multiply weights (N, K) of these shapes in fp8. Parts of fused layers begin
    and end at multiples of the model's width, itself one of the head dim, 64 or 128: they need no check of their
    own."""
    for shape in shapes:
        if device.type == "cuda" and any(size % _MULTIPLE for size in shape):
            raise ValueError(
                f"set linear = exact: fp8 needs layers whose sizes are multiples of {_MULTIPLE}; this model has one of "
                f"{' x '.join(map(str, shape))}"
            )
