"""Attention on one rank, behind one signature.

Every back end is f(q, k, v, scale) -> (out, lse) with q, out (B, Lq, h, D), k, v (B, Lk, h, D) and lse (B, h, Lq)
float32, the natural logarithm of the softmax denominators, by which kernels/merge.py joins results over parts of the
keys; or, of some that attend to all keys, None.

These are torch's own kernels, called by their operator names because `scaled_dot_product_attention` hides the LSE, and
FlashAttention-3 where its package is installed. Those that attend in 8 bits are in lossy.py.
"""

from collections.abc import Callable

import torch

from ..config import AttentionChoice
from . import flash3, lossy, trial

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor | None]]

_aten = torch.ops.aten


def _heads_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors)


def math(q, k, v, scale):
    """softmax(q k^T scale) v written out in float32: the reference."""
    qf, kf, vf = _heads_first(q.float(), k.float(), v.float())
    scores = qf @ kf.transpose(-1, -2) * scale
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ vf).transpose(1, 2).to(q.dtype), lse


def flash_cpu(q, k, v, scale):
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(q, k, v), 0.0, False, scale=scale)
    return out.transpose(1, 2), lse


def flash_cuda(q, k, v, scale):
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(*_heads_first(q, k, v), 0.0, False, False, scale=scale)
    return out.transpose(1, 2), lse


def cudnn(q, k, v, scale):
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        *_heads_first(q, k, v), None, True, 0.0, False, False, scale=scale
    )
    # Rank 3 on torch 2.8, rank 4 with a trailing 1 on 2.11.
    return out.transpose(1, 2), lse.squeeze(-1) if lse.dim() == 4 else lse


def efficient(q, k, v, scale):
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
        *_heads_first(q, k, v), None, True, 0.0, False, scale=scale
    )
    # The kernel pads its LSE to a multiple of 32 queries.
    return out.transpose(1, 2), lse[..., : q.shape[1]]


def hopper(q, k, v, scale):
    """The faster one for the shape of cuDNN's and FlashAttention-3's."""
    return (flash3.flash3 if flash3.leads(q, k) else cudnn)(q, k, v, scale)


def hopper_split(q, k, v, scale):
    """The same over all keys, whose log-sum-exp nobody asks for."""
    return (flash3.flash3_split if flash3.leads(q, k) else cudnn)(q, k, v, scale)


_BACKENDS: dict[tuple[str, AttentionChoice], tuple[Attend, frozenset[torch.dtype]]] = {}
_HALF = frozenset((torch.bfloat16, torch.float16))
_ALL = _HALF | {torch.float32}
_BACKENDS["cuda", "cudnn"] = cudnn, _HALF
_BACKENDS["cuda", "flash"] = flash_cuda, _HALF
_BACKENDS["cuda", "efficient"] = efficient, _ALL
_BACKENDS["cuda", "math"] = math, _ALL
_BACKENDS["cuda", "flash3"] = flash3.flash3, frozenset((torch.bfloat16,))  # all that fa3-fwd has
_BACKENDS["cpu", "flash"] = flash_cpu, _ALL
_BACKENDS["cpu", "math"] = math, _ALL

_MIN_CUDNN_CAPABILITY = (9, 0)
"""cuDNN leads from Hopper on: 593 TFLOP/s against flash's 279 on an H200, 24 heads x 4608 tokens."""
_MIN_FLASH_CAPABILITY = (8, 0)
"""torch's flash and cuDNN kernels refuse GPUs before Ampere."""


def _flash3_works(device: torch.device, heads: tuple[int, int]) -> bool:
    """Whether FlashAttention-3 is there for a GPU and such heads, and right."""
    if torch.cuda.get_device_capability(device) != flash3.CAPABILITY or not flash3.installed():
        return False
    return not trial.problem(flash3.flash3, device, torch.bfloat16, heads, lse=True)


def choose(
    choice: AttentionChoice,
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    *,
    ring: bool = False,
) -> tuple[str, Attend]:
    """Returns the back end for a choice, and its name; `auto` takes the fastest that the device, the type and the shape
    allow, and attends in no fewer bits.

    heads: (h, D), those of this rank, with which a package's kernels are tried.
    ring: whether results over parts of the keys are merged, for which some have no LSE.

    Raises ValueError when the device, type or ring does not have the chosen one.
    """
    if choice in lossy.BACKENDS:
        return choice, lossy.back_end(choice, device, dtype, heads, ring=ring)
    have = [name for (kind, name), (_, types) in _BACKENDS.items() if kind == device.type and dtype in types]
    where, remedy, limit, capability = f"{device.type} ranks", "choose", "", None
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < _MIN_FLASH_CAPABILITY:
            have = [name for name in have if name not in ("cudnn", "flash")]
            where += f" of compute capability {capability[0]}.{capability[1]}"
        if "flash3" in have and not _flash3_works(device, heads):
            have = [name for name in have if name != "flash3"]
    if choice == "flash3" and capability == flash3.CAPABILITY and dtype == torch.bfloat16:
        remedy = "install the package fa3-fwd, for this torch, with the Python of ComfyUI, or choose"
    elif choice == "flash3":
        limit = ": it needs an H100 or H200, in bf16"
    splits = not ring and "flash3" in have and choice in ("auto", "flash3")
    splits = splits and flash3.can_split(device, heads, eight=False)
    if choice == "auto":
        if capability is not None and "cudnn" in have and capability >= _MIN_CUDNN_CAPABILITY:
            if "flash3" in have:
                return "cudnn and flash3", hopper_split if splits else hopper
            choice = "cudnn"
        else:
            choice = "flash" if "flash" in have else "efficient"
    if choice not in have:
        type_name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{remedy} attention = 'auto' or one of {', '.join(have)}: {choice!r} does not exist for {type_name} on "
            f"{where}{limit}"
        )
    return choice, flash3.flash3_split if choice == "flash3" and splits else _BACKENDS[device.type, choice][0]
