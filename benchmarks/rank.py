"""One rank of a process set: runs a job and prints a line of JSON per configuration. Started by process_sets.py.

    torchrun --nproc_per_node=2 benchmarks/rank.py JOB.json

A job names `who` (ours, or a peer), model, tiny, device, cases, count, profile (names of configurations), outputs (a
folder), link, and what ours.py, peers.py or another module that it names as `side` reads.
"""

import dataclasses
import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from breakdown import breakdown
from common import CONFIGS, measure, random_model
from process_sets import MARK

from fastusp_backend.worker.process import die_with_parent, leave


def main() -> None:
    die_with_parent(os.getppid())
    job = json.loads(Path(sys.argv[1]).read_text())
    rank, device = int(os.environ["RANK"]), torch.device("cpu")
    if job["link"] == "sockets":  # what torchrun, and NCCL, would say on so many machines
        os.environ.update(LOCAL_WORLD_SIZE="1", NCCL_HOSTID=f"machine-{rank}")
    if job["device"] == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def say(line: dict) -> None:
        if rank == 0:
            print(MARK + json.dumps(line), flush=True)

    say({"about": {"device": _name(device), "torch": torch.__version__}})
    model = random_model(CONFIGS[job["model"], job["tiny"]], device, dtype)
    side = importlib.import_module("ours" if job["who"] == "ours" else job.get("side", "peers"))
    for number, (row, make) in enumerate(side.runs(job, model, dtype, device)):
        row["who"], row["case"] = job["who"], dataclasses.asdict(row["case"])
        run = None
        try:
            began = time.perf_counter()
            run = make()
            made = time.perf_counter() - began
            if row["reference"]:
                figures, out = {}, run().float().cpu()
            else:
                figures, out = measure(run, job["count"], device)
                figures["warm_up"] += made  # captures, for some
                if row["config"] in job["profile"]:
                    figures["breakdown"] = breakdown(run, figures["median"], device)
            if rank == 0:
                row["output"] = str(Path(job["outputs"]) / f"{number}.pt")
                torch.save(out, row["output"])
            say(row | figures)
        except Exception as error:  # the next configuration may still run; a rank that is alone with this one hangs
            say(row | {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"})
        del run, make
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    dist.destroy_process_group()
    leave(0)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
