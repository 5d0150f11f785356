"""Back ends that attend in 8 bits: never chosen by `auto`, and refused where they would not run, or be wrong."""

from collections.abc import Callable

import torch

from ..config import AttentionChoice
from . import flash3, sage, trial

BACKENDS: dict[AttentionChoice, tuple[tuple[Callable, Callable], ...]] = {
    "sage": ((sage.sage_whole, sage.sage), (sage.sage_triton, sage.sage_triton)),
    "flash3-fp8": ((flash3.flash3_fp8, flash3.flash3_fp8),),
}
"""As those of attention/local.py: for all keys at once, whose log-sum-exp nobody asks for, and for parts of them. The
first that works is taken."""
_OTHERWISE = "or choose another attention in USP Optimization Settings"


def installed() -> list[AttentionChoice]:
    """Those whose packages are there, which need not run on any GPU."""
    return [name for name, there in (("sage", sage.installed()), ("flash3-fp8", flash3.present())) if there]


def back_end(
    choice: AttentionChoice, device: torch.device, dtype: torch.dtype, heads: tuple[int, int], *, ring: bool
) -> Callable:
    """Returns one of BACKENDS, for heads (h, D); ring: for parts that are merged. Raises ValueError, which says first
    what to do, where none works on the device, in the type, with such heads or in parts."""
    return {"sage": _sage, "flash3-fp8": _flash3_fp8}[choice](device, dtype, heads, ring)


def _sage(device: torch.device, dtype: torch.dtype, heads: tuple[int, int], ring: bool) -> Callable:
    if not _fits(device, dtype, (torch.bfloat16, torch.float16), lambda capability: capability >= (8, 0)):
        raise ValueError(
            _elsewhere("sage", "GPUs from compute capability 8.0 (Ampere) on, in bf16 and fp16", device, dtype)
        )
    if not sage.installed():
        raise ValueError(
            f"install the package sageattention with the Python of ComfyUI, {_OTHERWISE}: attention = 'sage' finds no "
            f"such package"
        )
    if ring and _is_first_version():
        raise ValueError(
            f"install version 2 of SageAttention, set ring = 1 in USP Loader, {_OTHERWISE}: version 1 gives no "
            f"log-sum-exp, by which a ring joins its parts"
        )
    return _working("sage", device, dtype, heads, ring, "install a sageattention for this GPU and this torch")


def _is_first_version() -> bool:
    try:
        return not sage.gives_lse()
    except trial.FAILURES:
        return False  # it does not load, which the trial tells


def _flash3_fp8(device: torch.device, dtype: torch.dtype, heads: tuple[int, int], ring: bool) -> Callable:
    if not _fits(device, dtype, (torch.bfloat16,), lambda capability: capability == flash3.CAPABILITY):
        raise ValueError(_elsewhere("flash3-fp8", "H100 and H200, in bf16", device, dtype))
    if not flash3.installed():
        raise ValueError(
            f"install the package fa3-fwd, for this torch, with the Python of ComfyUI, {_OTHERWISE}: attention = "
            f"'flash3-fp8' finds none that loads"
        )
    found = _working("flash3-fp8", device, dtype, heads, ring, "install a fa3-fwd that has fp8")
    return flash3.flash3_fp8_split if not ring and flash3.can_split(device, heads, eight=True) else found


def _fits(device: torch.device, dtype: torch.dtype, types: tuple[torch.dtype, ...], capable: Callable) -> bool:
    return device.type == "cuda" and dtype in types and capable(torch.cuda.get_device_capability(device))


def _elsewhere(name: str, where: str, device: torch.device, dtype: torch.dtype) -> str:
    here = str(dtype).removeprefix("torch.") + f" on {device.type} ranks"
    if device.type == "cuda":
        here += " of compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
    return f"set attention = auto in USP Optimization Settings: attention = {name!r} is for {where}; this is {here}"


def _working(
    name: AttentionChoice,
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    ring: bool,
    remedy: str,
) -> Callable:
    failures = []
    for pair in BACKENDS[name]:
        failure = trial.problem(pair[ring], device, dtype, heads, lse=ring)
        if not failure:
            return pair[ring]
        failures.append(failure)
    raise ValueError(
        f"{remedy}, {_OTHERWISE}: attention = {name!r} does not run here, with {heads[0]} heads "
        f"of {heads[1]} values: " + "; ".join(dict.fromkeys(failures))
    )
