"""FlashAttention-3 (arXiv 2407.08608), a kernel for Hopper, from the package `fa3-fwd`."""

import functools
import importlib.util
import logging
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)

CAPABILITY = (9, 0)
_MODULE = "fa3_fwd_interface"
_QUERIES, _ROUNDS = 128, 3
"""Queries of one tile, and how often tiles must fill the GPU for this kernel to lead cuDNN's: on an H100 12 heads x
4608 tokens (3.3 times) took 220 us for 235, 6 heads 131 for 124, 6 x 16896 (6 times) 1249 for 1348."""
_DIM = 128
"""The head dim of which that was measured: its tiles are others for any other."""


@functools.cache
def _function() -> Callable | None:
    """The package's function, None where it is not installed. Raises ImportError where it does not load, as one that
    was built for another torch."""
    if importlib.util.find_spec(_MODULE) is None:
        return None
    return importlib.import_module(_MODULE).flash_attn_func


@functools.cache
def installed() -> bool:
    """Whether it can be used. A package that does not load is told in the log, once."""
    try:
        return _function() is not None
    except (ImportError, OSError, RuntimeError) as error:
        log.warning("FlashAttention-3 is installed but does not load, so that cuDNN's attention is used: %s", error)
        return False


def flash3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See attention/local.py."""
    return _function()(q, k, v, softmax_scale=scale, return_attn_probs=True)


def leads(q: torch.Tensor) -> bool:
    """Whether it is the fastest for queries (B, L, h, D) of so many tokens and heads. Of another head dim than
    128 it is not known to be."""
    batch, length, heads, dim = q.shape
    units = torch.cuda.get_device_properties(q.device).multi_processor_count
    return dim == _DIM and batch * heads * -(-length // _QUERIES) >= _ROUNDS * units
