"""Where the time of an evaluation goes, by torch.profiler: GEMM, attention, exchange, element-wise, and gaps.

Kernels are told by their names. An exchange is exposed while nothing else runs on the device.
"""

from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist
from common import synchronize
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

EVALUATIONS = 3
TOP = 16

KINDS = {
    "exchange": (
        "nccl",
        "signal",
        "memcpy",
        "gloo",
        "c10d",
        "all_to_all",
        "all_gather",
        "barrier",
        "_put_kernel",
        "_wait_kernel",
    ),
    "attention": ("fmha", "flash", "sdpa", "attention", "softmax"),
    "gemm": ("gemm", "gemv", "nvjet", "xmma", "cutlass", "cublas", "splitk", "linear", "matmul", "aten::addmm"),
}
"""A kernel is of the first kind of which its lower-case name contains a word; all else is element-wise."""

COLUMNS = ("gemm", "attention", "elementwise", "exchange", "exposed", "busy", "gaps")


def kind(name: str) -> str:
    name = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "elementwise")


def breakdown(run: Callable[[], torch.Tensor], median: float, device: torch.device) -> dict:
    """Profiles one evaluation, in ms.

    Per kind: the sum over its kernels, each in full where several run beside each other.
    exposed: exchange while nothing else runs.
    busy: while anything runs.
    gaps: the median of the timed evaluations less that.
    kernels: the longest, (name, ms, calls).
    """
    cuda = device.type == "cuda"
    dist.barrier()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(EVALUATIONS):
            run()
        synchronize(device)
    if cuda:
        events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    else:
        events = [event for event in profiler.events() if event.cpu_parent is None]
    per_kind, per_name, calls = Counter(), Counter(), Counter()
    for event in events:
        milliseconds = event.time_range.elapsed_us() / 1000 / EVALUATIONS
        per_kind[kind(event.name)] += milliseconds
        per_name[event.name] += milliseconds
        calls[event.name] += 1
    spans = [(e.time_range.start, e.time_range.end) for e in events]
    computing = [span for span, e in zip(spans, events, strict=True) if kind(e.name) != "exchange"]
    busy = _covered(spans) / 1000 / EVALUATIONS
    found = {name: per_kind[name] for name in ("gemm", "attention", "elementwise", "exchange")}
    found |= {"exposed": busy - _covered(computing) / 1000 / EVALUATIONS, "busy": busy, "gaps": max(0, median - busy)}
    longest = [(name, milliseconds, calls[name] / EVALUATIONS) for name, milliseconds in per_name.most_common(TOP)]
    return found | {"kernels": longest}


def _covered(spans: list[tuple[float, float]]) -> float:
    """Returns the length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
