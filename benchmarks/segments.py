"""What an element-wise segment costs on one GPU: microseconds of ours, of the compiler's and of torch's separate
operations, with modulations of one row and with a row for each token.

PYTHONPATH may name another revision's folder: its segments are timed then.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind PYTHONPATH

import fastusp_backend
from fastusp_backend.kernels import tokens
from fastusp_backend.models.segments import Segments

SETS = 6
"""Of tensors that take turns, more than an L2 cache holds: in a model no segment finds its tokens there."""
ARGUMENTS = {"norm": (1, 2), "add": (2, 1), "add_norm": (2, 3)}
"""Of each segment: how many streams, and how many modulations."""


def chosen(reference, streams: int, rows: torch.Tensor | None):
    """A segment's plain torch, each modulation taken by token first."""

    def run(*tensors: torch.Tensor):
        if rows is None:
            return reference(*tensors)
        return reference(*tensors[:streams], *(tensor[:, rows] for tensor in tensors[streams:]))

    return run


def microseconds(run: Callable, sets: list[tuple[torch.Tensor, ...]], count: int) -> float:
    """The median time of one call, in a CUDA graph of them all, as the engine runs them."""
    for arguments in sets:
        run(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            for arguments in sets:
                run(*arguments)
    return replayed(graph, count) * 1000 / 4 / len(sets)


def replayed(graph: torch.cuda.CUDAGraph, count: int) -> float:
    """The median milliseconds of its replays."""
    times = []
    for _ in range(count):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="4608,2304", help="tokens of a rank (default 4608,2304)")
    parser.add_argument("--width", type=int, default=3072, help="of a token (default 3072)")
    parser.add_argument("--count", type=int, default=50, help="replays that are timed (default 50)")
    arguments = parser.parse_args()
    device, width = torch.device("cuda"), arguments.width
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {Path(fastusp_backend.__file__).parent}")
    print(f"bfloat16, C = {width}; us\n")
    print(f"{'segment':10}{'L':>6}{'rows':>6}{'ours':>9}{'ours fp8':>10}{'compiled':>10}{'separate':>10}")
    for length in map(int, arguments.lengths.split(",")):
        for name, (streams, modulations) in ARGUMENTS.items():
            for count in (1, 2):
                rows = None if count == 1 else (torch.arange(length, device=device) >= length // 2).long()
                draw = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
                sets = []
                for _ in range(SETS):
                    table = draw(1, count, 6 * width).split(width, -1)
                    sets.append((*(draw(1, length, width) for _ in range(streams)), *table[:modulations]))
                reference = chosen(getattr(tokens, f"{name}_reference"), streams, rows)
                torch.compiler.reset()
                runs = []
                for fp8 in (False, True):
                    segments = Segments(device, fused=True, fp8=fp8)
                    runs.append(getattr(segments if rows is None else segments.by_row(rows), name))
                runs += [torch.compile(reference, fullgraph=True), reference]
                figures = [microseconds(run, sets, arguments.count) for run in runs]
                cells = f"{figures[0]:9.1f}{figures[1]:10.1f}{figures[2]:10.1f}{figures[3]:10.1f}"
                print(f"{name:10}{length:6}{count:6}{cells}", flush=True)


if __name__ == "__main__":
    main()
