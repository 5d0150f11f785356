"""A full-size file on GPUs of which another process leaves only so much: where do its weights lie, how long do loading
and a step take, and are the latents those of GPUs that are free?

    python benchmarks/capped.py --folder /tmp/models --model flux2 --gpus 0,1 --free all,40 --storage bfloat16

Writes the file (random weights) where it is missing. Runs what the nodes run: a pool, which chooses by itself where
weights lie unless --weights says it. NCCL_P2P_DISABLE=1 for GPUs without peer access.
"""

import argparse
import contextlib
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import paths  # noqa: F401
import torch
from common import CONFIGS, MODELS
from files import FORMATS, write_as

from fastusp_backend import nvml
from fastusp_backend.cli.inputs import random_inputs
from fastusp_backend.config import ModelSpec, Settings
from fastusp_backend.devices import Devices
from fastusp_backend.errors import FastUSPError
from fastusp_backend.planner import plan
from fastusp_backend.pool import Pool, Progress, Session

BALLAST = """
import sys, torch
held = []
for number, gigabytes in enumerate(map(float, sys.argv[1:])):
    free, _ = torch.cuda.mem_get_info(number)
    more = free - int(gigabytes * 1e9)
    held.append(torch.empty(max(0, more), dtype=torch.uint8, device=f"cuda:{number}"))
print("ready", flush=True)
sys.stdin.read()
"""


def write(path: Path, model: str, stored: str) -> None:
    write_as(path, CONFIGS[model, False], torch.device("cuda", 0), stored)


@contextlib.contextmanager
def ballast(free: str, gpus: int) -> Iterator[None]:
    """Has a process that leaves `free` GB of each GPU; `all` for none."""
    if free == "all":
        yield
        return
    command = [sys.executable, "-c", BALLAST, *[free] * gpus]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError("the memory of the GPUs could not be taken")
            yield
        finally:
            process.stdin.close()


def left(gpus: tuple[int, ...]) -> list[float]:
    """Free GB of each GPU."""
    return [state["free"] / 1e9 for state in nvml.ask("states") if state["index"] in gpus]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, default="flux")
    parser.add_argument("--gpus", default="0,1")
    parser.add_argument("--free", default="all,24", help="GB of each GPU, a row each")
    parser.add_argument("--file", choices=FORMATS, default="bfloat16", help="how it stores the blocks' weights")
    parser.add_argument(
        "--storage",
        choices=["bfloat16", "float8_e4m3fn"],
        help="weight_dtype; default: the node's, unpacked where it fits",
    )
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--linear", choices=("exact", "fp8"), default="exact")
    parser.add_argument("--steps", type=int, default=10)
    a = parser.parse_args()
    path = a.folder / f"{a.model}-{a.file}.{'gguf' if a.file.startswith('Q') else 'safetensors'}"
    if not path.exists():
        a.folder.mkdir(parents=True, exist_ok=True)
        writer = multiprocessing.get_context("spawn").Process(target=write, args=(path, a.model, a.file))
        writer.start()
        writer.join()
    gpus = tuple(map(int, a.gpus.split(",")))
    config, settings = CONFIGS[a.model, False], Settings(weights=a.weights, linear=a.linear)
    spec = ModelSpec.of_file(
        str(path), storage=a.storage or "bfloat16", compute="bfloat16", keep_quantised=a.storage is None
    )
    x, prompt = random_inputs(config, (1024, 1024), 512)
    expected = None
    for free in a.free.split(","):
        phases, seconds = [], []
        with ballast(free, len(gpus)), contextlib.closing(Pool(Devices(ranks=len(gpus), gpus=gpus))) as pool:
            before = left(gpus)  # the pool's processes start with the first request
            session = Session(pool, spec, (plan(len(gpus), config.heads),), settings)
            sigmas = torch.linspace(1, 0, a.steps + 1)

            def step(event, _, seconds=seconds, phases=phases) -> None:
                phases.append((time.perf_counter() - event.seconds, "step"))
                seconds.append(event.seconds)

            def phase(text, phases=phases) -> None:
                phases.append((time.perf_counter(), text))

            progress = Progress(step=step, phase=phase)
            try:
                out = session.sample(x, sigmas, sampler="euler", positive=prompt, progress=progress)
            except FastUSPError as error:
                print(f"{free} GB free: {error}", flush=True)
                continue
            began = next(i for i, (_, text) in enumerate(phases) if text == "loading the model")
            loading, median = phases[began + 1][0] - phases[began][0], statistics.median(seconds[3:]) * 1000
            expected = out if expected is None else expected
            after = left(gpus)
            used = max(b - a for b, a in zip(before, after, strict=True))
            print(
                f"{free} GB free, {a.file} file, {a.storage or 'as stored'}, linear {a.linear}: {pool.held.weights}; "
                f"loaded in {loading:.1f} s, "
                f"{median:.1f} ms a step, {used:.1f} GB used of each GPU, {min(after):.1f} left, "
                f"{pool.held.transport}, same latents {torch.equal(out, expected)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
