"""One step with weights that stay, and with blocks that travel: time, memory, and whether the bits are the same.

    torchrun --nproc_per_node=2 benchmarks/placements.py --model flux --rows whole,shared,host,shared:28

A row is a value of the option `weights`, and how many blocks travel where that is not all. NCCL_P2P_DISABLE=1 for
exchanges by way of the host. Full-size models with random weights; the whole model is there first, and its blocks'
weights move row by row.
"""

import argparse
import functools
import os
import time

import paths  # noqa: F401
import torch
import torch.distributed as dist
from common import CONFIGS, MODELS, Case, Inputs, measure, random_inputs, random_model
from ours import held_by_rows

from fastusp_backend.comm.mesh import make_mesh, single_rank_mesh
from fastusp_backend.comm.transport import Transport, reach_each_other
from fastusp_backend.config import FileState, ModelSpec, Settings
from fastusp_backend.engine import Denoiser
from fastusp_backend.engine.block_stream import BlockStream
from fastusp_backend.engine.room import make_store
from fastusp_backend.models.files import storage_plans
from fastusp_backend.models.ownership import Ownership
from fastusp_backend.models.placement import place, stream_count
from fastusp_backend.planner import plan
from fastusp_backend.weights.stored import Stored
from fastusp_backend.weights.tensor_info import TensorInfo


def plans_of(model, spec):
    """As if the model came from a file of its own types."""
    header = {model.file_key(name): TensorInfo(tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
    return storage_plans(model, header, spec)


def copies(model, stream: BlockStream) -> dict[str, Stored]:
    """All streamed weights."""
    found = {}
    with stream.changing():
        for name in stream.names:
            stream.open(name)
            stored = model.get_submodule(name.rpartition(".")[0]).stored
            scale = None if stored.scale is None else stored.scale.clone()
            found[name] = Stored(stored.data.clone(), scale, stored.packing)
    return found


@torch.inference_mode()
def step(denoiser: Denoiser, given: Inputs) -> torch.Tensor:
    return torch.stack(denoiser(given.x, given.timestep, given.prompts, lambda: None))


WARM_SECONDS = 4
"""A GPU that was idle computes its first steps faster than all that follow."""


def warm(run) -> None:
    """As many times on all ranks."""
    started, go_on = time.perf_counter(), torch.ones(1)
    while go_on:
        for _ in range(8):
            run()
        go_on = torch.tensor([float(time.perf_counter() - started < WARM_SECONDS)])
        dist.broadcast(go_on, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="flux")
    parser.add_argument("--rows", default="whole,shared,host")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--linear", choices=("exact", "fp8"), default="exact")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    a = parser.parse_args()
    device = torch.device("cpu")
    if a.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
    config = CONFIGS[a.model, a.tiny]
    model = random_model(config, device, dtype)
    spec = ModelSpec(path="", file=FileState(0, 0, 0, 0), storage=None, compute=str(dtype).removeprefix("torch."))
    if a.linear == "fp8":
        model = held_by_rows(model)
        spec = ModelSpec(path="", file=spec.file, storage=None, compute=spec.compute, linear="fp8")
    plans = plans_of(model, spec)
    ownership = Ownership(model, plans, ranks)
    peers = ranks > 1 and (a.device == "cpu" or reach_each_other(dist.group.WORLD))
    layout = plan(ranks, config.heads)
    mesh = make_mesh(layout, device) if ranks > 1 else single_rank_mesh(device)
    transport = Transport(mesh)
    given = random_inputs(config, Case(a.size, (a.text,), 1), device, dtype)
    if rank == 0:
        name = torch.cuda.get_device_name(device) if a.device == "cuda" else "CPU"
        what = f"{a.model}, {a.size} pixels, {a.text} tokens, linear {a.linear}"
        print(f"{what}: {ranks} x {name}, {layout} over {transport}")
        heads = ("ms", "x whole", "min", "max", "GB come", "GB/s", "used GB")
        print(f"{'weights':12}" + "".join(f"{head:>9}" for head in heads) + "  same bits", flush=True)
    warm(functools.partial(step, Denoiser(model, mesh, transport, Settings(linear=a.linear), dtype), given))
    whole, expected, stream = None, None, None
    for row in a.rows.split(","):
        choice, _, count = row.partition(":")
        if stream is not None:
            values = copies(model, stream)
            stream.free()
            model.stream = stream = None
            for name, value in values.items():
                model.get_submodule(name.rpartition(".")[0]).stored = value
            del values
        if choice != "whole":
            placement = place(model, plans, ownership, choice, peers=peers)
            if count:
                placement = stream_count(model, plans, ownership, placement.source, int(count), peers=peers)
            stream = BlockStream(model, placement, plans, make_store(placement, device), device)
            values = {name: model.get_submodule(name.rpartition(".")[0]).stored for name in stream.names}
            stream.allocate()
            stream.share()
            for name in list(values):
                stream.load(name, values.pop(name))
            stream.meet()
            model.stream = stream
        if a.device == "cuda":
            torch.cuda.empty_cache()
        denoiser = Denoiser(model, mesh, transport, Settings(linear=a.linear), dtype)
        run = functools.partial(step, denoiser, given)
        figures, out = measure(run, a.count, device)
        used = 0.0
        if a.device == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            used = (total - free) / 1e9
        if choice == "whole":
            whole, expected = figures["median"], out
        come = stream.placement.streamed_bytes / 1e9 if stream else 0.0
        if rank == 0:
            ms = figures["median"]
            print(
                f"{row:12} {ms:8.1f} {ms / (whole or ms):8.3f} {figures['min']:8.1f} {figures['max']:8.1f} {come:8.2f} "
                f"{come / ms * 1000:6.0f} {used:8.1f} {'-' if expected is None else torch.equal(out, expected)}",
                flush=True,
            )
        del denoiser, run
        if a.device == "cuda":
            torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
