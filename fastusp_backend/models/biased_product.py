"""Products with a bias, of few rows, on GPUs: the product's own kernel adds the bias at its end (its epilogue), or the
product is added to rows that hold the bias already.

For the first torch asks cublasLt for a kernel, for the second cuBLAS, and with few rows one of them may choose badly:
of W (3072, 12288), in bf16, on an H200 with torch 2.11, 576 rows (one of eight GPUs' share of FLUX.1's 4608 tokens)
take 82 us in the first way and 70 in the second, filling the rows included; 288 rows take 39 and 62. No rule tells
which. So the first product of a shape measures both, and `choices` keeps what it chose.

Both add up in float32. The second may round once more, before the bias is added: FLUX of two double and four single
blocks had an error of 1.211e-3 in float16 for 1.204e-3 where the MLP's part of linear2 took it.
"""

import functools
import logging

import torch
import torch.nn.functional as F

from .. import choices

log = logging.getLogger(__name__)

_ROWS = range(128, 1025)
"""With fewer kernels differ by a microsecond or two; with more, tiles fill a GPU in any kernel."""
_LEAST_WORK = 1 << 33
"""rows x N x K that are worth a choice: 20 us at 800 TFLOP/s."""
_GAIN = 0.95
"""Of the time with an epilogue, that the other way must take less than: of the shapes above it takes 0.85 and 1.6."""
_TURNS, _CALLS = 8, 5
_AHEAD = 1_000_000
"""Clock cycles, half a millisecond, that the GPU waits until calls are queued."""


def biased_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x W^T + b: x (..., K), weight (N, K), bias (N,) -> (..., N).

    The first call of a shape may measure, and then waits for the GPU. While it is captured nothing can be measured: a
    shape that was never computed has its bias in the epilogue then.
    """
    rows = x.numel() // x.shape[-1]
    halves = x.dtype in (torch.bfloat16, torch.float16)
    if not x.is_cuda or not halves or rows not in _ROWS or rows * weight.numel() < _LEAST_WORK:
        return F.linear(x, weight, bias)
    question = _question(x.device, x.dtype, rows, *weight.shape, weight.stride(0))
    if torch.cuda.is_current_stream_capturing():
        way = choices.known(question, _WAYS) or "epilogue"
    else:
        way = choices.choose(question, _WAYS, lambda: _measured(x, weight, bias))
    return _WAYS[way](x, weight, bias)


@functools.cache
def _question(device: torch.device, dtype: torch.dtype, rows: int, n: int, k: int, pitch: int) -> str:
    gpu, libraries = torch.cuda.get_device_name(device), f"torch {torch.__version__} CUDA {torch.version.cuda}"
    return f"bias of {rows} x {n} x {k} of {pitch} {str(dtype).removeprefix('torch.')}, {gpu}, {libraries}"


def _epilogue(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight, bias)


def _prefilled(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    flat = x.flatten(0, -2)
    return bias.repeat(len(flat), 1).addmm_(flat, weight.t()).unflatten(0, x.shape[:-1])


_WAYS = {"epilogue": _epilogue, "prefilled": _prefilled}


def _measured(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> str:
    """Returns the way with rows that hold the bias where it is `_GAIN` faster, else the epilogue."""
    times: dict[str, list[float]] = {name: [] for name in _WAYS}
    with torch.cuda.device(x.device):
        for _ in range(_TURNS):
            for name, way in _WAYS.items():
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(_AHEAD)
                first.record()
                for _ in range(_CALLS):
                    way(x, weight, bias)
                last.record()
                last.synchronize()
                times[name].append(first.elapsed_time(last))
    least = {name: min(ms) / _CALLS for name, ms in times.items()}  # what is loaded or runs beside slows the others
    log.info("ms of a product with its bias, weight %s: %s", tuple(weight.shape), least)
    return "prefilled" if least["prefilled"] < _GAIN * least["epilogue"] else "epilogue"
