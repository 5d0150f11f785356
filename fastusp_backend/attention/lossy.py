"""Back ends that attend in 8 bits: never chosen by `auto`, and refused where they would not run.

Packages are built for some GPUs and for one torch, and say so by failing, so that each is tried once on a few tokens.
"""

import functools
from collections.abc import Callable

import torch

from ..config import AttentionChoice
from . import flash3, sage

BACKENDS: dict[AttentionChoice, tuple[Callable, Callable]] = {
    "sage": (sage.sage_whole, sage.sage),
    "flash3-fp8": (flash3.flash3_fp8, flash3.flash3_fp8),
}
"""As those of attention/local.py: for all keys at once, whose log-sum-exp nobody asks for, and for parts of them."""
_TOKENS = 128
_OTHERWISE = "or choose another attention in USP Optimization Settings"


def installed() -> list[AttentionChoice]:
    """Those whose packages are there, which need not run on any GPU."""
    return [name for name, there in (("sage", sage.installed()), ("flash3-fp8", flash3.present())) if there]


def back_end(choice: AttentionChoice, device: torch.device, dtype: torch.dtype, *, ring: bool) -> Callable:
    """Returns that of BACKENDS, ring: for parts that are merged. Raises ValueError, which says first what to do, where
    it does not run on the device, in the type or in parts."""
    problem = {"sage": _sage, "flash3-fp8": _flash3_fp8}[choice](device, dtype, ring)
    if problem:
        raise ValueError(problem)
    return BACKENDS[choice][ring]


def _sage(device: torch.device, dtype: torch.dtype, ring: bool) -> str:
    if not _fits(device, dtype, (torch.bfloat16, torch.float16), lambda capability: capability >= (8, 0)):
        return _elsewhere("sage", "GPUs from compute capability 8.0 (Ampere) on, in bf16 and fp16", device, dtype)
    if not sage.installed():
        return (
            f"install the package sageattention with the Python of ComfyUI, {_OTHERWISE}: attention = 'sage' finds no "
            f"such package"
        )
    if failure := _failure("sage", device, dtype):
        return (
            f"install a sageattention for this GPU and this torch, {_OTHERWISE}: attention = 'sage' does not run "
            f"here: {failure}"
        )
    if ring and not sage.gives_lse():
        return (
            f"install version 2 of SageAttention, set ring = 1 in USP Loader, {_OTHERWISE}: version 1 gives no "
            f"log-sum-exp, by which a ring joins its parts"
        )
    return ""


def _flash3_fp8(device: torch.device, dtype: torch.dtype, ring: bool) -> str:
    if not _fits(device, dtype, (torch.bfloat16,), lambda capability: capability == flash3.CAPABILITY):
        return _elsewhere("flash3-fp8", "H100 and H200, in bf16", device, dtype)
    if not flash3.installed():
        return (
            f"install the package fa3-fwd, for this torch, with the Python of ComfyUI, {_OTHERWISE}: attention = "
            f"'flash3-fp8' finds none that loads"
        )
    if failure := _failure("flash3-fp8", device, dtype):
        return (
            f"install a fa3-fwd that has fp8, {_OTHERWISE}: attention = 'flash3-fp8' does not run with the one that "
            f"is here: {failure}"
        )
    return ""


def _fits(device: torch.device, dtype: torch.dtype, types: tuple[torch.dtype, ...], capable: Callable) -> bool:
    return device.type == "cuda" and dtype in types and capable(torch.cuda.get_device_capability(device))


def _elsewhere(name: str, where: str, device: torch.device, dtype: torch.dtype) -> str:
    here = str(dtype).removeprefix("torch.") + f" on {device.type} ranks"
    if device.type == "cuda":
        here += " of compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
    return f"set attention = auto in USP Optimization Settings: attention = {name!r} is for {where}; this is {here}"


@functools.cache
def _failure(name: AttentionChoice, device: torch.device, dtype: torch.dtype) -> str:
    """Attends with a few tokens -> why that fails, empty where it does not."""
    q = torch.zeros(1, _TOKENS, 1, 128, device=device, dtype=dtype)
    try:
        BACKENDS[name][0](q, q, q, 1.0)
    except torch.OutOfMemoryError:
        raise
    except (ImportError, OSError, AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""
