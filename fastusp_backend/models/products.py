"""Products with a bias, of few rows, on GPUs: the bias in their epilogue, or in the rows that they add to.

For the first torch asks cublasLt for a kernel, for the second cuBLAS, and with few rows one of them may choose badly:
of W (3072, 12288), in bf16, on an H200 with torch 2.11, 576 rows (one of eight GPUs' share of FLUX.1's 4608 tokens)
take 82 us in the first way and 70 in the second, a copy of the bias included; 288 rows take 39 and 62. No rule tells
which. So the first product of a shape measures both, and `choices` keeps the faster one.

Both add up in float32. The second may round once more, before the bias is added. (Of the error of FLUX in float16, two
double and four single blocks, that was 1 % where linear2's products took it, and 3 to 12 % where all did.)
"""

import functools
import statistics

import torch
import torch.nn.functional as F

from .. import choices

_ROWS = range(128, 1025)
"""With fewer the two differ by a microsecond or two; with more, tiles fill a GPU in either's kernel."""
_LEAST_WORK = 1 << 33
"""rows x N x K that are worth a choice: 20 us at 800 TFLOP/s."""
_GAIN = 0.9
"""Of the time with an epilogue, that the other way must take less than: so that machines seldom differ in it."""
_TURNS, _CALLS = 5, 5
_AHEAD = 1_000_000
"""Clock cycles, half a millisecond, that the GPU waits until calls are queued."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b: x (..., K), weight (N, K), bias (N,) or None -> (..., N).

    The first call of a shape may measure, and then waits for the GPU. While it is captured nothing can be measured: a
    shape that was never computed has its bias in the epilogue then.
    """
    rows = x.numel() // x.shape[-1]
    halves = x.dtype in (torch.bfloat16, torch.float16)
    if bias is None or not x.is_cuda or not halves or rows not in _ROWS or rows * weight.numel() < _LEAST_WORK:
        return F.linear(x, weight, bias)
    asked = _asked(x.device, x.dtype, rows, *weight.shape)
    if torch.cuda.is_current_stream_capturing():
        way = choices.known(asked, _WAYS) or "epilogue"
    else:
        way = choices.kept(asked, _WAYS, lambda: _measured(x, weight, bias))
    return _WAYS[way](x, weight, bias)


@functools.cache
def _asked(device: torch.device, dtype: torch.dtype, rows: int, n: int, k: int) -> str:
    gpu, libraries = torch.cuda.get_device_name(device), f"torch {torch.__version__} CUDA {torch.version.cuda}"
    return f"bias of {rows} x {n} x {k} {str(dtype).removeprefix('torch.')}, {gpu}, {libraries}"


def _epilogue(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight, bias)


def _rows_of_bias(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    flat = x.flatten(0, -2)
    out = bias.expand(len(flat), -1).contiguous()
    return out.addmm_(flat, weight.t()).unflatten(0, x.shape[:-1])


_WAYS = {"epilogue": _epilogue, "rows": _rows_of_bias}


def _measured(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> str:
    """Returns the faster way."""
    times: dict[str, list[float]] = {name: [] for name in _WAYS}
    with torch.cuda.device(x.device):
        for turn in range(_TURNS + 1):
            for name, way in _WAYS.items():
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(_AHEAD)
                first.record()
                for _ in range(_CALLS):
                    way(x, weight, bias)
                last.record()
                last.synchronize()
                if turn:  # the first loads kernels
                    times[name].append(first.elapsed_time(last))
    epilogue, rows = (statistics.median(times[name]) for name in ("epilogue", "rows"))
    return "rows" if rows < _GAIN * epilogue else "epilogue"
