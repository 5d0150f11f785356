"""Loading a full-size FLUX.1-dev file through the product's path, on one GPU or several that share the reading.

    python benchmarks/load.py --folder /tmp/models
    torchrun --nproc_per_node=2 benchmarks/load.py --folder /tmp/models --repeat 3

Writes the file (random bf16, 24 GB) where it is missing. Prints per rank and turn the seconds, the rate, what the
process grew by, and the GPU memory; then of parking the model in host memory and bringing it back. The first turn of a
new file reads from memory as well: it was just written.
"""

import argparse
import os
import time
from pathlib import Path

import paths  # noqa: F401
import torch
import torch.distributed as dist
from files import write_model

from fastusp_backend.config import ModelSpec
from fastusp_backend.engine.checkpoint import Checkpoint
from fastusp_backend.engine.parking import HostShard, resident_bytes, tensors_of
from fastusp_backend.models.synthetic import FLUX_DEV


def resident() -> dict[str, int]:
    """Returns this process's memory in bytes by kind, as Linux counts it."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0] in ("VmRSS:", "VmHWM:", "RssAnon:")}


def park(model: torch.nn.Module, device: torch.device, rank: int) -> None:
    """To host memory and back, twice: the first time pins the memory. Beside it a plain copy of one piece of pinned
    memory."""
    shard = HostShard(device)
    for turn in range(2):
        seconds = []
        for step in (shard.park, shard.reserve, shard.fetch):
            torch.cuda.synchronize()
            started = time.perf_counter()
            step(*([tensors_of(model)] if step == shard.park else []))
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        away, _, back = seconds
        print(
            f"RESULT parking {turn} rank {rank}: {shard.nbytes / 1e9:.2f} GB of host memory, away {away:.2f} s, back "
            f"{sum(seconds[1:]):.2f} s (room {seconds[1]:.2f}), {shard.nbytes / back / 1e9:.1f} GB/s",
            flush=True,
        )
    shard.close()
    pinned = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(pinned, device=device)
    target.copy_(pinned)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(4):
        target.copy_(pinned, non_blocking=True)
    torch.cuda.synchronize()
    rate = 4 * pinned.nbytes / (time.perf_counter() - started) / 1e9
    print(f"RESULT plain copy of pinned memory, rank {rank}: {rate:.1f} GB/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--storage", choices=["bfloat16", "float16", "float8_e4m3fn"], default="bfloat16")
    a = parser.parse_args()

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    path = a.folder / "flux-dev-random.safetensors"
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        dist.all_reduce(torch.ones(1, device=device))  # connections are made before anything is timed
    if rank == 0 and not path.exists():
        a.folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        write_model(path, FLUX_DEV, device)
        print(f"wrote {path} in {time.perf_counter() - started:.0f} s", flush=True)
    if world > 1:
        dist.barrier()
    size = path.stat().st_size
    if rank == 0:
        print(f"{world} x {torch.cuda.get_device_name()}, torch {torch.__version__}, {size / 1e9:.2f} GB", flush=True)
    for turn in range(a.repeat):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = resident()
        started = time.perf_counter()
        spec = ModelSpec.of_file(str(path), storage=a.storage, compute="bfloat16")
        checkpoint = Checkpoint(spec, rank, world)
        described = time.perf_counter()
        checkpoint.allocate(device, dist.group.WORLD if world > 1 else None)
        allocated = time.perf_counter()
        model = checkpoint.read()
        torch.cuda.synchronize()
        read = time.perf_counter()
        after, peak = resident(), torch.cuda.max_memory_allocated()
        grown = {name: (after[name] - before[name]) / 2**20 for name in after}
        loaded = resident_bytes(tensors_of(model))
        print(
            f"RESULT turn {turn} rank {rank}: {read - started:6.2f} s (header {described - started:.2f}, room "
            f"{allocated - described:.2f}), {size / (read - allocated) / 1e9:5.1f} GB/s; RSS {grown['VmRSS']:+.0f} "
            f"MiB, anonymous {grown['RssAnon']:+.0f}, its peak {grown['VmHWM']:+.0f}; GPU weights {loaded / 2**30:.2f} "
            f"GiB, peak {peak / 2**30:.2f}",
            flush=True,
        )
        del checkpoint
        if turn == a.repeat - 1:
            park(model, device, rank)
        del model
        torch.cuda.empty_cache()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
