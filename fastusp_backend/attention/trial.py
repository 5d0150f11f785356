"""A package's attention, tried once as it will be used: in a CUDA graph, on inputs that it was not captured with.

Packages are built for some GPUs and for one torch, and say so by failing. Others are wrong in silence: kernels that are
launched on the default stream, whatever stream is current, are not in a graph, and race with what is computed around
them. SageAttention 2.2 has such.
"""

import functools
import logging
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)

_TOKENS, _HEADS, _DIM = 128, 2, 128
_SCALE = _DIM**-0.5
_BOUND = 0.1
"""Of the relative error of results, and of the error of the log-sum-exp: 8 bits give half of it. What lies on another
stream gives 1 and more."""


@functools.cache
def problem(attend: Callable, device: torch.device, dtype: torch.dtype) -> str:
    """Says why a back end (attention/local.py) does not work there, once in the log as well; empty where it does.

    Waits for the device. Raises torch.OutOfMemoryError.
    """
    if found := _problem(attend, device, dtype):
        log.warning("%s in %s is not used: %s", attend.__name__, attend.__module__, found)
    return found


def _problem(attend: Callable, device: torch.device, dtype: torch.dtype) -> str:
    try:
        with torch.inference_mode():
            return _on_gpu(attend, device, dtype) if device.type == "cuda" else _on_cpu(attend, dtype)
    except torch.OutOfMemoryError:
        raise
    except (ImportError, OSError, AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__


def _on_cpu(attend: Callable, dtype: torch.dtype) -> str:
    given = _tokens(0, dtype)
    return _verdict("", _error(attend(*given, _SCALE), given))


def _on_gpu(attend: Callable, device: torch.device, dtype: torch.dtype) -> str:
    # The current stream once more: where a capture fails, torch leaves its own as the current one.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        given, fresh = (_tokens(seed, dtype).to(device) for seed in (0, 1))
        at_once = _error(attend(*given, _SCALE), given)
        return _verdict("", at_once) or _verdict("in a CUDA graph ", _error(_replayed(attend, given, fresh), fresh))


def _replayed(attend: Callable, given: torch.Tensor, fresh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a graph that was captured with `given` gives for `fresh`."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = attend(*given, _SCALE)
    torch.cuda.synchronize()  # with what is not in the graph, and has run
    for result in results:
        if result is not None:
            result.fill_(torch.nan)
    given.copy_(fresh)
    # On a stream that does not wait for the default one, as little as that waits for it.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.replay()
    torch.cuda.synchronize()
    return tuple(result if result is None else result.clone() for result in results)


def _tokens(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """q, k, v in one."""
    return torch.randn(3, 1, _TOKENS, _HEADS, _DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _error(found: tuple[torch.Tensor, torch.Tensor | None], given: torch.Tensor) -> float:
    """The larger one of both results' errors; NaN where either is."""
    q, k, v = given.double()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * _SCALE
    wanted = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    out, lse = found
    errors = [(out.double() - wanted).norm() / wanted.norm()]
    if lse is not None:
        errors.append((lse.double() - scores.logsumexp(-1)).abs().max())
    return torch.stack(errors).max().item()


def _verdict(where: str, error: float) -> str:
    return "" if error < _BOUND else f"{where}its error is {error:.2g}, where less than {_BOUND} is right"
