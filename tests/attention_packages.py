"""Packages of attention in 8 bits in plain torch: what they take, refuse, round and return. fa3-fwd 0.0.3,
sageattention 1.0.6 and 2.2."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from fastusp_backend.attention import flash3, sage, trial

LOG2_E = 1.44269504
REMEMBERED = flash3._package, flash3._operator, flash3.installed, sage._function, sage.gives_lse, trial.problem


def clear() -> None:
    """Forgets which packages were found."""
    for function in REMEMBERED:
        function.cache_clear()


def install(monkeypatch, *names: str) -> None:
    """Has these of PACKAGES be there, and no others."""
    for module, _ in PACKAGES.values():
        monkeypatch.setitem(sys.modules, module, None)
    for name in names:
        module, functions = PACKAGES[name]
        made = ModuleType(module)
        made.__spec__ = ModuleSpec(module, None)
        vars(made).update(functions)
        monkeypatch.setitem(sys.modules, module, made)
    clear()


def _attend(q, k, v, scale, *, rounded=lambda p: p, summed=torch.matmul, zeros: int = 0):
    """q, k, v (B, h, L, D) float32 -> out, natural LSE of scaled scores. rounded: the probabilities, of at most 1, that
    values are summed with; summed: how; zeros: keys of zeros that are counted, too."""
    scores = q @ k.transpose(-1, -2) * scale
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True) + zeros * (-largest).exp()
    return summed(rounded(weights), v) / total, (total.log() + largest).squeeze(-1)


def _on_tensor_cores(p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """p @ v as Hopper's tensor cores sum products of e4m3: 32 at a time and the sum so far, each cut to 14 bits of the
    largest of them (DeepSeek-V3, arXiv 2412.19437)."""
    total = v.new_zeros(*p.shape[:-1], v.shape[-1])
    for some, values in zip(p.split(32, -1), v.split(32, -2), strict=True):
        terms = torch.cat([total[..., None, :], some[..., None] * values[..., None, :, :]], -2)
        unit = 2.0 ** (terms.abs().amax(-2, keepdim=True).frexp().exponent - 14)
        total = ((terms / unit).trunc() * unit).sum(-2)
    return total


def _e4m3(p: torch.Tensor) -> torch.Tensor:
    return p.to(torch.float8_e4m3fn).float()


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    return_attn_probs=False,
):
    """(B, L, h, D) e4m3 -> out bfloat16, LSE (B, h, Lq); descales (B, h) float32. 2^8 x probabilities are e4m3."""
    batch, _, heads, dim = q.shape
    assert q.dtype == k.dtype == v.dtype == torch.float8_e4m3fn and dim % 16 == 0
    assert all(t.stride(-1) == 1 for t in (q, k, v)) and k.shape == v.shape
    for descale in (q_descale, k_descale, v_descale):
        assert descale.shape == (batch, heads) and descale.dtype == torch.float32
    wide = [t.float().transpose(1, 2) * s[..., None, None] for t, s in ((q, q_descale), (k, k_descale), (v, v_descale))]
    out, lse = _attend(*wide, softmax_scale, rounded=lambda p: _e4m3(p * 256) / 256, summed=_on_tensor_cores)
    out = out.transpose(1, 2).bfloat16()
    return (out, lse) if return_attn_probs else out


def _blocks(x: torch.Tensor, rows: int) -> torch.Tensor:
    """int8 with a scale per block of so many rows, as float32; x (B, h, L, D)."""
    parts = []
    for block in x.split(rows, 2):
        scale = block.abs().amax((2, 3), keepdim=True) / 127
        parts.append((block / torch.where(scale > 0, scale, 1)).round() * scale)
    return torch.cat(parts, 2)


def sage_1(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
    """Changes the caller's keys, and fills keys up to 64 with zeros that it counts; no LSE."""
    assert q.dtype in (torch.float16, torch.bfloat16, torch.float32) and tensor_layout == "NHD" and not is_causal
    if smooth_k:
        k -= k.mean(1, keepdim=True)
    wide = [t.transpose(1, 2).float() for t in (q, k, v.half())]
    given = _blocks(wide[0], 128), _blocks(wide[1], 64), wide[2]
    out, _ = _attend(*given, sm_scale, rounded=lambda p: p.half().float(), zeros=-k.shape[1] % 64)
    return out.transpose(1, 2).to(q.dtype)


def sage_2(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    """Smooths keys whatever is asked for, and corrects the LSE (base 2 inside) in the type of q."""
    assert q.dtype in (torch.float16, torch.bfloat16) and tensor_layout == "NHD" and not is_causal
    mean = k.mean(1, keepdim=True)
    correction = (q.transpose(1, 2) @ mean.transpose(1, 2).transpose(2, 3)).squeeze(-1).float()
    wide = [t.transpose(1, 2).float() for t in (q, k, v)]
    smoothed = wide[1] - mean.transpose(1, 2).float()
    scale = wide[2].abs().amax(2, keepdim=True) / 448
    values = _e4m3(wide[2] / torch.where(scale > 0, scale, 1)) * scale
    out, lse = _attend(_blocks(wide[0], 32), _blocks(smoothed, 64), values, sm_scale, rounded=_e4m3)
    out, lse = out.transpose(1, 2).to(q.dtype), lse * LOG2_E
    return (out, lse / LOG2_E + correction * sm_scale) if return_lse else out


def sage_2_triton(q, k, v, tensor_layout="HND", sm_scale=None, smooth_k=True, return_lse=False, **kwargs):
    """Of version 2: its own smoothing is not played."""
    assert q.dtype in (torch.float16, torch.bfloat16) and tensor_layout == "NHD" and not smooth_k and return_lse
    wide = [t.transpose(1, 2).float() for t in (q, k, v.half())]
    given = _blocks(wide[0], 128), _blocks(wide[1], 64), wide[2]
    out, lse = _attend(*given, sm_scale, rounded=lambda p: p.half().float())
    return out.transpose(1, 2).to(q.dtype), lse


PACKAGES = {
    "flash3-fp8": ("fa3_fwd_interface", {"flash_attn_func": flash_attn_func}),
    "flash-attn 3": ("flash_attn_interface", {"flash_attn_func": flash_attn_func}),
    "sage": ("sageattention", {"sageattn": sage_2, "sageattn_qk_int8_pv_fp16_triton": sage_2_triton}),
    "sage 1": ("sageattention", {"sageattn": sage_1}),
}
"""Each one's module, and its functions."""
