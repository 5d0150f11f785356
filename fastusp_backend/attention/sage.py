"""SageAttention (arXiv 2410.02367, 2411.10958), from the package `sageattention`: scores in 8 bits.

Queries and keys are int8 with a scale per block of tokens, in version 2 per thread's part of one; values are float16
or, in version 2 on GPUs from Ada on, e4m3 with a scale per channel. The package takes the kernel that it has for the
GPU. Those that version 2.2 has in CUDA are launched on the default stream, so that no graph contains them: where that
is so (attention/trial.py) its kernel in Triton is taken, which is slower, and whose values are float16.

Keys go in without their mean (kernels/smooth.py). Version 1 would subtract it from the caller's own keys. Version 2
does so by itself, beside its rounding, and adds to its log-sum-exp (natural, of scaled scores) what that takes from it,
in the type of q: too coarse for a mean that counts. So where parts are merged it gets keys that have none.

Version 1, which is all that package indices have, gives no log-sum-exp. And it counts keys that are not there where
their number is no multiple of 64: its last block is filled up with zeros, whose score is 0.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable

import torch

from ..kernels.smooth import smooth

_MODULE = "sageattention"
_KEYS = 64
"""Of a block in version 1."""


@functools.cache
def _function(name: str = "sageattn") -> Callable:
    return getattr(importlib.import_module(_MODULE), name)


@functools.cache
def gives_lse() -> bool:
    """Whether the package is of version 2. Raises ImportError where it is not installed or does not load."""
    return "return_lse" in inspect.signature(_function()).parameters


def installed() -> bool:
    """Whether there is such a package, which need not load."""
    return importlib.util.find_spec(_MODULE) is not None


def sage(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See attention/local.py; version 2."""
    smoothed, shift = smooth(q, k)
    out, lse = _function()(q, smoothed, v, tensor_layout="NHD", sm_scale=scale, return_lse=True)
    return out, lse.add_(shift, alpha=scale)


def sage_whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, None]:
    """The same over all keys, without a log-sum-exp; either version."""
    options = {"tensor_layout": "NHD", "sm_scale": scale}
    if gives_lse():
        return _function()(q, k, v, **options), None
    return _function()(q, smooth(q, k)[0], v, smooth_k=False, **options), None


def sage_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As `sage`, by the kernel in Triton that version 2 has. Values beyond float16, which ends at 65504, come out as
    NaN."""
    smoothed, shift = smooth(q, k)
    attend = _function("sageattn_qk_int8_pv_fp16_triton")
    out, lse = attend(q, smoothed, v, tensor_layout="NHD", sm_scale=scale, smooth_k=False, return_lse=True)
    return out, lse.add_(shift, alpha=scale)


def problem_with(keys: int) -> str:
    """Says why the package cannot attend to so many keys; empty where it can."""
    if gives_lse() or keys % _KEYS == 0:
        return ""
    return (
        f"install version 2 of SageAttention, or choose another attention in USP Optimization Settings: version 1 is "
        f"right for multiples of {_KEYS} tokens alone, and here are {keys}"
    )
