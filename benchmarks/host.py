"""Whole prompts in a real ComfyUI: KSampler on a stock model against the same node on USP Loader's, seconds a prompt.

    python benchmarks/host.py --comfyui ~/ComfyUI --gpus 0,1 --file /tmp/flux.safetensors
    python benchmarks/host.py --comfyui ~/ComfyUI --gpus 0 --file /tmp/flux.safetensors --shared 40

Needs no text encoder: prompts are seeded tensors. The file is written (FLUX.1-dev, random bf16) where it is missing.
Each configuration has a ComfyUI of its own, just started: `first` includes all that a first prompt waits for, workers,
loading and capture too; on a machine that has just started, the first configuration's also reads ComfyUI's and CUDA's
own files from the disk. `prompt` is the median of the later ones, each with another seed: from the request to ComfyUI's
word that it has ended. A `step` is the median time between two of its progress events;
what a prompt takes `beyond` its steps lies `before` the first step has ended (less a step) and `after` the last one.
Prompts are a second apart: behind each one ComfyUI registers its files, and often collects garbage, which the next one
would wait for. `difference` is the largest relative (Frobenius) difference of the latents from stock's.

--shared leaves so many GB free on the first GPU, for ComfyUI's model and the workers' together, and lets stock and USP
take turns in one ComfyUI: what each prompt takes, and how much memory ComfyUI and the workers use after it.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import paths  # noqa: F401
import pynvml
import torch
from comfy import ComfyUI
from common import CONFIGS
from files import write_model
from workflows import Graph

from fastusp_backend.cli.table import Column, Table

OPTIONS = {
    "USP": {},
    "USP, linear fp8": {"linear": "fp8"},
    "USP, park": {"residency": "park"},
}
"""Name -> options of USP Optimization Settings."""
STOCK, COMPILED = "stock", "stock, TorchCompileModel"
PAUSE_SECONDS = 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--comfyui", type=Path, required=True, help="its folder; its Python is venv/bin/python there")
    made.add_argument("--python", help="another Python for it")
    made.add_argument("--file", type=Path, required=True)
    made.add_argument("--weight-dtype", default="default", help="of both loaders, as fp8_e4m3fn")
    made.add_argument("--gpus", default="all", help="of USP Loader; cpu:2 runs all of it on the CPU, a tiny file then")
    made.add_argument(
        "--configs", default=f"{STOCK};USP;USP, linear fp8", help=f"{STOCK} first; of: " + "; ".join(configs())
    )
    made.add_argument("--size", type=int, default=1024)
    made.add_argument("--text", type=int, default=512)
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--prompts", type=int, default=4, help="of each configuration, at least 2")
    made.add_argument("--shared", type=float, help="GB of the first GPU that all have together")
    return made


def configs() -> list[str]:
    return [STOCK, COMPILED, *OPTIONS]


def model_node(graph: Graph, name: str, a: argparse.Namespace) -> list:
    file, dtype = a.file.name, a.weight_dtype
    if name in OPTIONS:
        settings = {"wire": "exact", "attention": "auto"} | OPTIONS[name]
        return graph.usp(a.gpus, file=file, weight_dtype=dtype, settings=graph.node("FastUSPSettings", **settings))
    model = graph.node("UNETLoader", unet_name=file, weight_dtype=dtype)
    return graph.node("TorchCompileModel", model=model, backend="inductor") if name == COMPILED else model


@contextlib.contextmanager
def started(a: argparse.Namespace) -> Iterator[ComfyUI]:
    """A ComfyUI that has just started, and has the file; its last words where something fails."""
    with tempfile.TemporaryDirectory(prefix="fastusp-bench-") as folder:
        base = Path(folder)
        (base / "models/diffusion_models").mkdir(parents=True)
        (base / "models/diffusion_models" / a.file.name).symlink_to(a.file.resolve())
        host = ComfyUI(a.comfyui.expanduser(), base, ["--cpu"] if on_cpu(a) else [])
        try:
            host.wait_until_ready()
            yield host
        except Exception:
            print(host.log_text()[-6000:], file=sys.stderr)
            raise
        finally:
            host.stop()


def on_cpu(a: argparse.Namespace) -> bool:
    return a.gpus.startswith("cpu")


class Times(NamedTuple):
    """Seconds of a prompt: all of it, one step, and what is before and after the steps."""

    whole: float
    step: float
    before: float
    after: float


def prompt(host: ComfyUI, name: str, seed: int, a: argparse.Namespace) -> tuple[Times, torch.Tensor]:
    """Returns what it took, and the latents."""
    graph = Graph()
    sampled = graph.sample(
        model_node(graph, name, a),
        seed=seed,
        steps=a.steps,
        positive=graph.prompt(tokens=a.text),
        latent_image=graph.empty(a.size, a.size),
    )
    saved = graph.save(sampled)
    time.sleep(PAUSE_SECONDS)
    outcome = host.run(graph)
    at = [when for _, _, when in outcome.progress]
    step = statistics.median(b - a for a, b in itertools.pairwise(at))
    times = Times(outcome.ended - outcome.queued, step, at[0] - outcome.queued - step, outcome.ended - at[-1])
    return times, outcome.latents[saved].float()


def compare(a: argparse.Namespace) -> None:
    stock: dict[int, torch.Tensor] = {}
    table = Table(
        Column("configuration", 24),
        Column("first s", 7, ".1f"),
        Column("prompt s", 8, ".2f"),
        Column("step ms", 7, ".1f"),
        Column("before ms", 9, ".0f"),
        Column("after ms", 8, ".0f"),
        Column("beyond ms", 9, ".0f"),
        Column("x stock", 7, ".2f"),
        Column("difference", 10, ".1e"),
        markdown=True,
    )
    print(table.head(), flush=True)
    base = None
    for name in a.configs.split(";"):
        all_times, apart = [], [0.0]
        with started(a) as host:
            for seed in range(a.prompts):
                times, latents = prompt(host, name, seed, a)
                all_times.append(times)
                wanted = stock.setdefault(seed, latents)
                apart.append(((latents - wanted).norm() / wanted.norm()).item())
        median = Times(*map(statistics.median, zip(*all_times[1:], strict=True)))
        base = base or median.whole
        beyond = median.whole - a.steps * median.step
        of_it = [1000 * seconds for seconds in (median.step, median.before, median.after, beyond)]
        print(table.row(name, all_times[0].whole, median.whole, *of_it, base / median.whole, max(apart)), flush=True)


def turns(a: argparse.Namespace) -> None:
    _hog = torch.empty(int(torch.cuda.mem_get_info(0)[0] - a.shared * 1e9), dtype=torch.uint8, device="cuda:0")
    table = Table(
        Column("prompt", 24),
        Column("s", 6, ".2f"),
        Column("ComfyUI GB", 10, ".1f"),
        Column("workers GB", 10, ".1f"),
        Column("pool", 40),
        Column("free GB", 7, ".1f"),
        markdown=True,
    )
    print(table.head(), flush=True)
    names = a.configs.split(";")
    with started(a) as host:
        for turn, name in itertools.product(range(3), names):
            times, _ = prompt(host, name, turn, a)
            (device, *_), pools = host.get("/system_stats")["devices"], host.get("/fastusp/status")["pools"]
            held = "; ".join(f"{pool['held']}" for pool in pools)
            mine = device["torch_vram_total"] / 1e9
            workers = sum(used_by_process()[pid] for pool in pools for pid in pool.get("pids", ()))
            free = device["vram_free"] / 1e9
            print(table.row(name, times.whole, mine, workers, held, free), flush=True)


def used_by_process() -> Counter[int]:
    """Returns process id -> GB of GPU memory, over all GPUs."""
    pynvml.nvmlInit()
    used = Counter()
    for index in range(pynvml.nvmlDeviceGetCount()):
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(index)):
            used[process.pid] += (process.usedGpuMemory or 0) / 1e9
    return used


def main() -> None:
    a = parser().parse_args()
    names = a.configs.split(";")
    if names[0] != STOCK or not set(names) <= set(configs()) or min(a.prompts, a.steps) < 2:
        others = "; ".join(configs())
        raise SystemExit(f"--configs are {STOCK}, then any of: {others}; --prompts and --steps are 2 or more")
    cpu = on_cpu(a)
    if not a.file.exists():
        device = torch.device("cpu" if cpu else "cuda")
        write_model(a.file, CONFIGS["flux", cpu], device, torch.float32 if cpu else torch.bfloat16)
    if a.python:
        os.environ["COMFYUI_PYTHON"] = a.python
    if a.shared:
        turns(a)
    else:
        compare(a)


if __name__ == "__main__":
    main()
