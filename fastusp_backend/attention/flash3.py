"""FlashAttention-3 (arXiv 2407.08608), a kernel for Hopper, from the package `fa3-fwd` or `flash-attn` 3; in the type
of queries, keys and values, and in 8 bits.

In 8 bits it multiplies e4m3 with one scale for each (batch item, head) of q, k and v, the only ones it takes; 2^8 times
the probabilities are e4m3 too, and sums what the tensor cores give. Its log-sum-exp is natural, of scaled scores. What
8 bits cost is in kernels/smooth.py: keys and values go in without their means. (The paper has scales for each block and
rotates q and k by a random Hadamard matrix against single large channels; the package takes no scales but those, and
what large channels share over the tokens is what the means take away.) A packed block of the ring has a scale
for each (token, head), so it is unpacked before.
"""

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable

import torch

from ..kernels.smooth import add_mean, quantise_heads
from .trial import FAILURES

log = logging.getLogger(__name__)

CAPABILITY = (9, 0)
_MODULES = "fa3_fwd_interface", "flash_attn_interface"
"""Of fa3-fwd and of flash-attn 3, whose function is the same."""
_LONG, _QUERIES, _ROUNDS = 4096, 128, 3
"""For how many tokens this kernel leads cuDNN's; and for fewer, queries of one tile, and how often tiles must fill the
GPU. In CUDA graphs, on an H100: 4608 tokens x 24, 12, 6 and 3 heads 385, 217, 110 and 58 us for 406, 235, 119 and 61;
2304 tokens x 24 heads (3.3 times) 121 for 124, 12 heads and fewer within 3.5 % of each other, 1152 x 12 21.9 for 20.8.
On an H200 it led in all of these. A rule and no timing at each start, whose chance would decide a picture's last bits."""
_DIM = 128
"""The head dim of which that was measured: its tiles are others for any other."""


@functools.cache
def _function() -> Callable | None:
    """The function of the first package that loads, None where none is installed. Raises what the last one raised
    where none loads, as one that was built for another torch, or is from before `return_attn_probs`."""
    failure = None
    for module in filter(importlib.util.find_spec, _MODULES):
        try:
            function = importlib.import_module(module).flash_attn_func
            if "return_attn_probs" not in inspect.signature(function).parameters:
                raise ImportError(f"{module} is an older version, without return_attn_probs")
            return function
        except FAILURES as error:
            failure = error
    if failure is not None:
        raise failure
    return None


def present() -> bool:
    """Whether there is such a package, which need not load."""
    return any(map(importlib.util.find_spec, _MODULES))


@functools.cache
def installed() -> bool:
    """Whether it can be used. A package that does not load is told in the log, once."""
    try:
        return _function() is not None
    except FAILURES as error:
        log.warning("FlashAttention-3 is installed but does not load, so that cuDNN's attention is used: %s", error)
        return False


def flash3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See attention/local.py."""
    return _function()(q, k, v, softmax_scale=scale, return_attn_probs=True)


def flash3_fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See attention/local.py; bfloat16, which is what the kernel gives for 8 bits."""
    heads = quantise_heads(q, k, v)
    of_q, of_k, of_v = heads.scales
    out, lse = _function()(
        heads.q,
        heads.k,
        heads.v,
        softmax_scale=scale,
        q_descale=of_q,
        k_descale=of_k,
        v_descale=of_v,
        return_attn_probs=True,
    )
    add_mean(out, heads.mean)
    return out, lse.add_(heads.shift, alpha=scale)


def leads(q: torch.Tensor) -> bool:
    """Whether it is the fastest for queries (B, L, h, D) of so many tokens and heads. Of another head dim than
    128 it is not known to be."""
    batch, length, heads, dim = q.shape
    units = torch.cuda.get_device_properties(q.device).multi_processor_count
    fills = batch * heads * -(-length // _QUERIES) >= _ROUNDS * units
    return dim == _DIM and (length >= _LONG or fills)
