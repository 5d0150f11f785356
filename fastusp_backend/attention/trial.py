"""A package's attention, tried once as it will be used: with as many heads of that dim, with a log-sum-exp where parts
are merged, in a CUDA graph, on inputs that it was not captured with.

Packages are built for some GPUs, some head dims and for one torch, and say so by failing. Others are wrong in silence:
kernels that are launched on the default stream, whatever stream is current, are not in a graph, and race with what is
computed around them. SageAttention 2.2 has such.
"""

import contextlib
import functools
import logging
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)

_TOKENS = 512
"""Several tiles of keys in every package: what is made of parts must join some that are not empty."""
_BOUND = 0.1
"""Of the relative error of results, and of the error of the log-sum-exp: 8 bits give half of it. What lies on another
stream gives 1 and more."""
FAILURES = ImportError, OSError, AssertionError, AttributeError, RuntimeError, TypeError, ValueError
"""What packages raise where they do not load or run."""


@functools.cache
def problem(attend: Callable, device: torch.device, dtype: torch.dtype, heads: tuple[int, int], *, lse: bool) -> str:
    """Says why a back end (attention/local.py) does not work there, once in the log as well; empty where it does.

    heads: (h, D), how many of them, and the values of each. lse: whether its log-sum-exp is asked for.

    Waits for the device. Raises torch.OutOfMemoryError.
    """
    if found := _problem(attend, device, dtype, heads, lse):
        log.warning("%s in %s is not used: %s", attend.__name__, attend.__module__, found)
    return found


def _problem(attend: Callable, device: torch.device, dtype: torch.dtype, heads: tuple[int, int], lse: bool) -> str:
    given, fresh = (_tokens(seed, dtype, heads).to(device) for seed in (0, 1))
    try:
        with torch.inference_mode():
            return (_on_gpu if device.type == "cuda" else _on_cpu)(attend, given, fresh, lse)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__


def _on_cpu(attend: Callable, given: torch.Tensor, _fresh: torch.Tensor, lse: bool) -> str:
    return _verdict("", attend(*given, _scale(given)), given, lse)


def _on_gpu(attend: Callable, given: torch.Tensor, fresh: torch.Tensor, lse: bool) -> str:
    device = given.device
    # The current stream once more: where a capture fails, torch leaves its own as the current one.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        if found := _verdict("", attend(*given, _scale(given)), given, lse):
            return found
        return _verdict("in a CUDA graph ", _replayed(attend, given, fresh), fresh, lse)


def _replayed(attend: Callable, given: torch.Tensor, fresh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a graph that was captured with `given` gives for `fresh`."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            results = attend(*given, _scale(given))
    except FAILURES:
        _end_capture(given.device, pool)
        raise
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


def _end_capture(device: torch.device, pool: tuple[int, int]) -> None:
    """Tells torch's allocator that a capture into `pool` failed. Older torch does not where the capture's end fails as
    well (pytorch #180395): the next `empty_cache`, and so the next capture, would find one under way, and raise. The
    pool's few MB stay in use: newer torch releases it itself (pytorch #190348), which must not be done twice."""
    renamed = getattr(torch._C, "_cuda_endAllocateToPool", None)  # in torch 2.8
    end = renamed or torch._C._cuda_endAllocateCurrentStreamToPool
    with contextlib.suppress(RuntimeError):  # where torch has told it
        end(device.index, pool)


def _tokens(seed: int, dtype: torch.dtype, heads: tuple[int, int]) -> torch.Tensor:
    """q, k, v in one."""
    return torch.randn(3, 1, _TOKENS, *heads, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _scale(given: torch.Tensor) -> float:
    return given.shape[-1] ** -0.5


def _error(found: tuple[torch.Tensor, torch.Tensor | None], given: torch.Tensor) -> float:
    """The larger one of both results' errors; NaN where either is."""
    q, k, v = given.double()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * _scale(given)
    wanted = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    out, lse = found
    errors = [(out.double() - wanted).norm() / wanted.norm()]
    if lse is not None:
        errors.append((lse.double() - scores.logsumexp(-1)).abs().max())
    return torch.stack(errors).max().item()


def _verdict(where: str, found: tuple[torch.Tensor, torch.Tensor | None], given: torch.Tensor, lse_wanted: bool) -> str:
    if lse_wanted and found[1] is None:
        return "it gives no log-sum-exp, by which a ring joins its parts"
    error = _error(found, given)
    return "" if error < _BOUND else f"{where}its error is {error:.2g}, where less than {_BOUND} is right"
