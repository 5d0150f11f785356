"""Whole sampling runs with and without a cache, on a warm pool: seconds a run, and how many evaluations were skipped.

    python benchmarks/caches.py --gpus 0,1 --model flux
    python benchmarks/caches.py --gpus cpu:2 --model flux --tiny --size 64 --text 9 --steps 6

Random weights, of which a cache may skip none or all: so the rows are what a run costs where it skips nothing, which is
the overhead, and where it skips all that it may. `quality.py` says how many a model that draws skips, at what error.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import paths  # noqa: F401
import torch
from common import CONFIGS, MODELS, Case, random_inputs
from files import write_model

from fastusp_backend.cli.table import Column, Table
from fastusp_backend.config import ModelSpec, Settings
from fastusp_backend.devices import parse_devices
from fastusp_backend.planner import plan
from fastusp_backend.pool import Pool, Progress, Session
from fastusp_backend.prompt import Prompt

ROWS = {
    "off": {},
    "easy, skips nothing": {"cache": "easy", "cache_threshold": 0.0},
    "first_block, skips nothing": {"cache": "first_block", "cache_threshold": 0.0},
    "easy, skips all": {"cache": "easy", "cache_threshold": 1e9},
    "first_block, skips all": {"cache": "first_block", "cache_threshold": 1e9},
    "off again": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="all", help="as USP Loader's `gpus`")
    parser.add_argument("--model", choices=MODELS, default="flux")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--runs", type=int, default=3, help="of each row, beside the first, which may capture")
    a = parser.parse_args()
    devices, config = parse_devices(a.gpus), CONFIGS[a.model, a.tiny]
    device = torch.device("cuda", devices.gpus[0]) if devices.gpus else torch.device("cpu")
    dtype = torch.bfloat16 if devices.gpus else torch.float32
    given = random_inputs(config, Case(a.size, (a.text,), 1), torch.device("cpu"), dtype)
    (tensors,) = given.prompts
    prompt, sigmas = Prompt(tensors.context, tensors.y, tensors.guidance), torch.linspace(1, 0, a.steps + 1)
    layout = plan(devices.ranks, config.heads)
    print(f"{a.model}, {a.size} px, text {a.text}, {a.steps} steps of euler; {layout} on {devices}")
    columns = Column("cache"), Column("s a run", format=".3f"), Column("x off", format=".2f"), Column("skipped")
    table = Table(*columns, markdown=True)
    print(table.head(), flush=True)
    pool = Pool(devices)
    with tempfile.TemporaryDirectory(prefix="fastusp-bench-") as folder:
        path = Path(folder) / "model.safetensors"
        write_model(path, config, device, dtype)
        spec = ModelSpec.of_file(str(path), storage=None, compute=str(dtype).removeprefix("torch."))
        try:
            off = None
            for name, options in ROWS.items():
                session, times, told = Session(pool, spec, (layout,), Settings(**options)), [], []
                for _ in range(1 + a.runs):
                    began = time.perf_counter()
                    more = {"timestep_scale": config.timestep_scale, "progress": Progress(done=told.append)}
                    session.sample(given.x, sigmas, sampler="euler", positive=prompt, **more)
                    times.append(time.perf_counter() - began)
                seconds = statistics.median(times[1:])
                off = off or seconds
                print(table.row(name, seconds, off / seconds, f"{told[-1].skipped} of {a.steps}"), flush=True)
        finally:
            pool.close()


if __name__ == "__main__":
    main()
