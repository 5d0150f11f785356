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
import math
from collections.abc import Callable

import torch

from ..kernels.smooth import add_mean, quantise_heads
from .trial import FAILURES

log = logging.getLogger(__name__)

CAPABILITY = (9, 0)
_MODULES = "fa3_fwd_interface", "flash_attn_interface"
"""Of fa3-fwd and of flash-attn 3, whose function is the same."""
_LONG, _ROUNDS = 4096, 3
"""Of heads of 128 values: for how many keys this kernel leads cuDNN's; and for fewer, how often tiles must fill the
GPU. In CUDA graphs, on an H100: 4608 tokens x 24, 12, 6 and 3 heads 385, 217, 110 and 58 us for 406, 235, 119 and 61;
2304 x 24 (3.3 times) 121 for 124, x 12 and fewer within 4 % of each other, 1152 x 12 21.9 for 20.8. On an H200 it led,
by 2 to 4 %, in the last two as well, and with 2048 queries x 24, 12 and 6 heads and 4608 keys 170, 111 and 56 us for
178, 120 and 61. A rule and no timing at each start, whose chance would decide a picture's last bits."""
_QUERIES, _QUERIES_OF_64 = 128, 192
"""Of a tile: cuDNN's, and this kernel's for heads of 128; its for heads of 64. There each round of tiles over the GPU
takes 6/5 as long as one of cuDNN's: that told the faster one of all 35 shapes that were measured on an H100, as 4250
tokens x 19, 12 and 6 heads, 211, 160 and 107 us for 232, 186 and 95, and 1125 x 24 and 19, 34.8 and 20.6 for 30.5 and
30.2."""


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


def leads(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether it is the fastest for queries (B, Lq, h, D) and keys (B, Lk, h, D); not where that is not known."""
    batch, length, heads, dim = q.shape
    units = torch.cuda.get_device_properties(q.device).multi_processor_count

    def filled(queries: int) -> float:
        return batch * heads * -(-length // queries) / units

    if dim == 64:
        return 6 * math.ceil(filled(_QUERIES_OF_64)) < 5 * math.ceil(filled(_QUERIES))
    return dim == 128 and (k.shape[1] >= _LONG or filled(_QUERIES) >= _ROUNDS)
