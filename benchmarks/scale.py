"""What one rank of 4, 8 or 16 GPUs does in a step, on two or one: its tokens, heads, messages, copies and signals are
those of one rank of so many, and the second GPU stands for all others.

    torchrun --nproc_per_node=2 benchmarks/scale.py --model flux --gpus 1,2,4,8,16

Both GPUs run the first rank's share. What a rank sends to each of its P - 1 peers goes to the other GPU, and so much
comes from there, at the same time and over the same link: as where all GPUs reach each other at full speed (NVSwitch),
or each has its own link to the host (NCCL_P2P_DISABLE=1). What is computed of it is no picture. Two take the step as a
real one, too, and both ways should agree within 3 %. A last line says where it stops scaling.

On one GPU (--nproc_per_node=1) a rank stands for its peers itself: what it sends comes back to it at once. Without peer
access that takes its link to the host both ways, as a real step does, but no other GPU is on the host's memory: with
exact values two ranks came out 3 to 4 % too fast, four 15 to 19. With peer access they only cross the GPU's own memory,
so that products, attention and gaps are told, and what is exposed is not.
"""

import argparse
import os
import statistics
import time
from itertools import pairwise

import paths  # noqa: F401
import torch
import torch.distributed as dist
from breakdown import breakdown
from common import CONFIGS, MODELS, Case, measure, random_inputs, random_model
from ours import evaluation
from played import played
from variants import VARIANTS

from fastusp_backend.cli.table import Column, fitted
from fastusp_backend.comm.mesh import Mesh, make_mesh, single_rank_mesh
from fastusp_backend.comm.transport import Transport, reach_each_other
from fastusp_backend.planner import plan

TURNS = 4
"""How often each way for a number of GPUs is measured, one after the other."""
HALF = 0.5
"""Of a GPU's speed, below which more of them are hardly worth it."""


def where_it_ends(steps: list[tuple[int, float]]) -> str:
    """Says from where on more GPUs are not worth their number. steps: (GPUs, ms), by their number."""
    alone = steps[0][0] * steps[0][1]
    for (fewer, before), (count, ms) in pairwise(steps):
        if ms >= before:
            return f"it stops scaling at {fewer} GPUs: {count} take {ms:.1f} ms, {fewer} {before:.1f}"
        if alone / ms / count < HALF:
            return f"from {count} GPUs on less than half of each is used: {alone / ms:.1f} times one's speed"
    return f"it scales to {steps[-1][0]} GPUs: {alone / steps[-1][1]:.1f} times one's speed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="flux")
    parser.add_argument("--gpus", default="1,2,4,8", help="without 1, one is taken for half as fast as two")
    parser.add_argument("--ring", type=int, default=0, help="degree of the ring; default: planned")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--variant", default="overlap")
    parser.add_argument("--tiny", action="store_true", help="2 blocks of 512 channels instead of the full size")
    a = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    config, dtype = CONFIGS[a.model, a.tiny], torch.bfloat16
    model, given = random_model(config, device, dtype), random_inputs(config, Case(a.size, (a.text,), 1), device, dtype)
    peers = reach_each_other(dist.group.WORLD)
    rows, steps, alone = [], [], None

    def heat(run) -> None:
        """Brings the GPUs to their power limit, as sampling does."""
        started, go_on = time.perf_counter(), torch.ones(1)
        while go_on:
            run()
            torch.cuda.synchronize()
            go_on = torch.tensor([float(time.perf_counter() - started < 3)])
            dist.broadcast(go_on, 0)

    def timed(ways: dict[str, tuple[Mesh, Transport]]) -> None:
        """Several ways for as many GPUs are measured in turns: GPUs get slower as they get hotter."""
        nonlocal alone
        runs, found = {}, {name: [] for name in ways}
        for name, (mesh, transport) in ways.items():
            runs[name] = evaluation(model, mesh, transport, VARIANTS[a.variant], given, dtype)
            runs[name]()
            for arena in transport._arenas[:1]:
                if mesh.layout.ranks > 1:
                    arena._buffer.view(dtype).normal_()  # what nobody sends; zeros would take less power
            heat(runs[name])
        for _ in range(TURNS):
            for name, run in runs.items():
                figures, _ = measure(run, -(-a.count // TURNS), device)
                found[name].append(figures["median"])
        for name, (mesh, _) in ways.items():
            ms = statistics.median(found[name])
            parts = breakdown(runs[name], ms, device)
            alone = alone or ms * mesh.layout.ranks
            shares = [parts[part] for part in ("gemm", "attention", "elementwise", "exposed", "gaps")]
            if not steps or steps[-1][0] != mesh.layout.ranks:  # two are real ones, and then played
                steps.append((mesh.layout.ranks, ms))
            rows.append((name, str(mesh.layout), ms, alone / ms, alone / ms / mesh.layout.ranks, *shares))

    for count in map(int, a.gpus.split(",")):
        if count == 1:
            mesh = single_rank_mesh(device)
            timed({"1": (mesh, Transport(mesh))})
            continue
        layout, ways = plan(count, config.heads, ring=a.ring), {}
        if count == dist.get_world_size():
            mesh = make_mesh(layout, device)
            ways[f"{count}, real"] = mesh, Transport(mesh)
        timed(ways | {f"{count}, played" if ways else str(count): played(layout, device, peers, a.text)})
    if dist.get_rank() == 0:
        columns = [
            Column("GPUs"),
            Column("layout"),
            Column("ms", format=".1f"),
            Column("x", format=".2f"),
            Column("efficiency", format=".2f"),
        ]
        columns += [Column(part, format=".1f") for part in ("products", "attention", "element-wise", "exposed", "gaps")]
        print(f"{a.model}, {a.size} pixels, {a.text} tokens, {'peer access' if peers else 'no peer access'}")
        print(fitted(tuple(columns), rows))
        print(where_it_ends(steps))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
