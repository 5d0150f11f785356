"""What a ControlNet's tensors cost an evaluation through a pool: 15 of 25 MB, as ComfyUI would send them.

    python benchmarks/control.py --gpus 0,1
    python benchmarks/control.py --gpus cpu:2

On GPUs a model of FLUX.1's width at 1024 x 1024, in bf16, with tensors on the first; on CPU ranks a narrow model and
a batch that is as large. Two blocks of each kind, random weights. Prints medians: an evaluation without, with tensors
where the last ones lay, and with new memory for them each time.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import paths  # noqa: F401
import torch

from fastusp_backend.config import ModelSpec, Settings
from fastusp_backend.devices import parse_devices
from fastusp_backend.models.synthetic import FLUX_DEV, TINY_FLUX, write_checkpoint
from fastusp_backend.planner import plan
from fastusp_backend.pool import Pool, Progress, Session
from fastusp_backend.prompt import Prompt

DOUBLE, SINGLE = 5, 10


def milliseconds(session: Session, given: tuple, residuals: dict | None, *, fresh: bool = False) -> float:
    if fresh and (channel := session.pool._workers.channel):
        channel.forget()
    started = time.perf_counter()
    session.evaluate(*given, Progress(), residuals)
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="cpu:2", help="as USP Loader's `gpus`")
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    devices = parse_devices(options.gpus)
    if devices.gpus:
        config, batch, side, dtype, device = FLUX_DEV, 1, 128, torch.bfloat16, "cuda"
    else:
        config, batch, side, dtype, device = (
            replace(TINY_FLUX, hidden=256, heads=2, mlp=64),
            96,
            32,
            torch.float32,
            "cpu",
        )
    config = replace(config, double_blocks=2, single_blocks=2)
    prompt = Prompt(torch.randn(batch, 64, 4096), torch.randn(batch, 768), torch.full((batch,), 3.5))
    given = torch.randn(batch, 16, side, side, device=device), torch.full((batch,), 0.7), prompt
    size = batch, side * side // 4, config.hidden
    tensors = [torch.randn(size, dtype=dtype, device=device) for _ in range(DOUBLE + SINGLE)]
    residuals = {"input": tensors[:DOUBLE], "output": tensors[DOUBLE:]}
    pool = Pool(devices)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flux.safetensors"
        write_checkpoint(str(path), config, dtype=dtype)
        spec = ModelSpec.of_file(str(path), storage=None, compute=str(dtype).removeprefix("torch."))
        session = Session(pool, spec, (plan(devices.ranks, config.heads),), Settings())
        cases = {
            "without": lambda: milliseconds(session, given, None),
            "lasting memory": lambda: milliseconds(session, given, residuals),
            "new memory": lambda: milliseconds(session, given, residuals, fresh=True),
        }
        try:
            print(f"{len(tensors)} tensors of {tensors[0].nbytes / 1e6:.1f} MB to {devices}")
            times = {label: [] for label in cases}
            for run in range(options.runs + 3):  # compiles, captures and maps first
                for label, measured in cases.items():
                    taken = measured()
                    times[label] += [taken] if run >= 3 else []
            for label, taken in times.items():
                print(f"{label}: median {statistics.median(taken):.1f} ms, {min(taken):.1f} to {max(taken):.1f}")
        finally:
            pool.close()


if __name__ == "__main__":
    main()
