"""FlashAttention-3 (arXiv 2407.08608), a kernel for Hopper, from the package `fa3-fwd` or `flash-attn` 3; in the type
of queries, keys and values, and in 8 bits. Of all keys at once, where nobody asks for a log-sum-exp, some queries may
be attended in parts, by the package's operator: rounds.py.

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
from types import ModuleType

import torch

from ..kernels.smooth import add_mean, quantise_heads
from . import trial
from .rounds import split

log = logging.getLogger(__name__)

CAPABILITY = (9, 0)
_MODULES = {"fa3_fwd_interface": "fa3_fwd", "flash_attn_interface": "flash_attn_3"}
"""Of fa3-fwd and of flash-attn 3, whose functions are the same, and where each one's operator is."""
_OPERATOR_TAKES = {"out", "q_descale", "k_descale", "v_descale", "softmax_scale", "num_splits"}
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
def _package() -> ModuleType | None:
    """The first package that loads, None where none is installed. Raises what the last one raised where none loads, as
    one that was built for another torch, or is from before `return_attn_probs`."""
    failure = None
    for name in filter(importlib.util.find_spec, _MODULES):
        try:
            package = importlib.import_module(name)
            if "return_attn_probs" not in inspect.signature(package.flash_attn_func).parameters:
                raise ImportError(f"{name} is an older version, without return_attn_probs")
            return package
        except trial.FAILURES as error:
            failure = error
    if failure is not None:
        raise failure
    return None


@functools.cache
def _operator() -> Callable:
    """The package's operator, which also writes into memory that it is given and attends to parts of the keys. Raises
    AttributeError where a version has none that takes these."""
    name = _MODULES[_package().__name__]
    operator = getattr(torch.ops, name).fwd
    if lacks := _OPERATOR_TAKES.difference(argument.name for argument in operator.default._schema.arguments):
        raise AttributeError(f"{name}::fwd has no {', '.join(sorted(lacks))}")
    return operator


def present() -> bool:
    """Whether there is such a package, which need not load."""
    return any(map(importlib.util.find_spec, _MODULES))


@functools.cache
def installed() -> bool:
    """Whether it can be used. A package that does not load is told in the log, once."""
    try:
        return _package() is not None
    except trial.FAILURES as error:
        log.warning("FlashAttention-3 is installed but does not load, so that cuDNN's attention is used: %s", error)
        return False


def flash3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See attention/local.py."""
    return _package().flash_attn_func(q, k, v, softmax_scale=scale, return_attn_probs=True)


def flash3_split(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, None]:
    """The same over all keys, without a log-sum-exp: the last tiles' queries in parts where rounds.py says so."""
    return _split(q, k, v, scale), None


def flash3_fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See attention/local.py; bfloat16, which is what the kernel gives for 8 bits."""
    heads = quantise_heads(q, k, v)
    out, lse = _package().flash_attn_func(
        heads.q,
        heads.k,
        heads.v,
        softmax_scale=scale,
        return_attn_probs=True,
        **_descales(heads.scales),
    )
    add_mean(out, heads.mean)
    return out, lse.add_(heads.shift, alpha=scale)


def flash3_fp8_split(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, None]:
    """As `flash3_split`."""
    return _in_eight_bits(_split, q, k, v, scale), None


def can_split(device: torch.device, heads: tuple[int, int], *, eight: bool) -> bool:
    """Whether the package attends in parts, rightly, to heads (h, D); eight: in 8 bits. Waits for the device."""
    attend = parts_of_keys_fp8 if eight else parts_of_keys
    return heads[1] == 128 and not trial.problem(attend, device, torch.bfloat16, heads, lse=False)


def parts_of_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, None]:
    """For a trial: half of the queries in two parts, whatever would gain."""
    return _in_halves(q, k, v, scale), None


def parts_of_keys_fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, None]:
    """As `parts_of_keys`."""
    return _in_eight_bits(_in_halves, q, k, v, scale), None


def _in_eight_bits(
    attend: Callable[..., torch.Tensor], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    heads = quantise_heads(q, k, v)
    out = attend(heads.q, heads.k, heads.v, scale, **_descales(heads.scales))
    add_mean(out, heads.mean)
    return out


def _descales(scales: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(("q_descale", "k_descale", "v_descale"), scales, strict=True))


def _in_halves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, **descales) -> torch.Tensor:
    return _in_parts(q, k, v, scale, q.shape[1] // 2, 2, **descales)


def _split(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, **descales: torch.Tensor) -> torch.Tensor:
    batch, queries, heads, _ = q.shape
    whole, parts = split(queries, k.shape[1], batch * heads, _units(q.device))
    return _in_parts(q, k, v, scale, whole, parts, **descales)


def _in_parts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    whole: int,
    parts: int,
    **descales: torch.Tensor,
) -> torch.Tensor:
    """Attends the first `whole` queries to all keys at once, the others to so many parts of them, which are joined."""
    out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    for rows, count in ((slice(0, whole), 1), (slice(whole, q.shape[1]), parts)):
        if rows.start < rows.stop:
            _operator()(q[:, rows], k, v, out=out[:, rows], softmax_scale=scale, num_splits=count, **descales)
    return out


def _units(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def leads(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether it is the fastest for queries (B, Lq, h, D) and keys (B, Lk, h, D); not where that is not known."""
    batch, length, heads, dim = q.shape
    units = _units(q.device)

    def rounds(queries: int) -> float:
        return batch * heads * -(-length // queries) / units

    if dim == 64:
        return 6 * math.ceil(rounds(_QUERIES_OF_64)) < 5 * math.ceil(rounds(_QUERIES))
    return dim == 128 and (k.shape[1] >= _LONG or rounds(_QUERIES) >= _ROUNDS)
