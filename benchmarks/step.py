"""One FLUX.1-dev evaluation, full size, random weights: our engine under its options, checked and timed in one run.

    torchrun --nproc_per_node=2 benchmarks/step.py --variants eager,compile,graph,overlap --size 1024 --text 512

Prints per variant the median, minimum and maximum of the timed evaluations in ms, and the relative error against one
GPU running eagerly with the same weights. The weights are N(0, 1 / fan_in): speed and parity are real, images are not.
"""

import argparse
import functools
import os
import statistics
import time

import torch
import torch.distributed as dist

from fastusp_backend.comm.mesh import make_mesh, single_rank_mesh
from fastusp_backend.comm.transport import Transport
from fastusp_backend.config import Layout, Settings
from fastusp_backend.engine import Denoiser
from fastusp_backend.models.family import Conditioning
from fastusp_backend.models.flux import Flux
from fastusp_backend.models.synthetic import FLUX_DEV

VARIANTS = {
    "eager": Settings(compile=False, cuda_graphs=False, overlap=False),
    "compile": Settings(compile=True, cuda_graphs=False, overlap=False),
    "graph": Settings(compile=True, cuda_graphs=True, overlap=False),
    "overlap": Settings(compile=True, cuda_graphs=True, overlap=True),
    "graph-no-compile": Settings(compile=False, cuda_graphs=True, overlap=True),
}


def random_model(device: torch.device) -> Flux:
    with torch.device("meta"):
        model = Flux(FLUX_DEV)
    model = model.to(torch.bfloat16).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("scale"):
            parameter.data.fill_(1)
        else:
            std = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.02
            parameter.data.normal_(std=std, generator=generator)
    return model.eval()


def timed(run, count: int) -> list[float]:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    dist.barrier()
    times = []
    for _ in range(count):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--variants", default="eager,compile,graph,overlap")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--text", default="512", help="token counts, comma-separated")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--ring", type=int, default=1)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--single", action="store_true", help="also time one GPU")
    parser.add_argument("--profile", default="", help="print the kernels of this variant")
    a = parser.parse_args()

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)

    def log(*words) -> None:
        if rank == 0:
            print(*words, flush=True)

    log(f"{world} x {torch.cuda.get_device_name()}, torch {torch.__version__}, {a.size} px, batch {a.batch}")
    model = random_model(device)
    own = single_rank_mesh(device)
    mesh = make_mesh(Layout(ulysses=world // a.ring, ring=a.ring), device)
    transport, own_transport = Transport(mesh), Transport(own)
    log(f"{mesh.layout}, transport {transport.kind}, weights {torch.cuda.memory_allocated() / 2**30:.1f} GiB")
    for text in map(int, a.text.split(",")):
        generator = torch.Generator(device).manual_seed(1)
        like = {"generator": generator, "device": device}
        x = torch.randn(a.batch, 16, a.size // 8, a.size // 8, **like)
        prompt = Conditioning(
            torch.randn(a.batch, text, 4096, **like).bfloat16(),
            torch.randn(a.batch, 768, **like).bfloat16(),
            torch.full((a.batch,), 3.5, device=device),
        )
        t = torch.full((a.batch,), 0.5)
        eager = Denoiser(model, own, own_transport, VARIANTS["eager"], torch.bfloat16)
        reference = eager(x, t, prompt).float()
        del eager
        names = a.variants.split(",")
        cases = [(name, mesh, transport) for name in names]
        if a.single:
            cases += [(f"1 GPU {name}", own, own_transport) for name in names[-1:]]
        for name, where, how in cases:
            started = time.perf_counter()
            torch.cuda.reset_peak_memory_stats()
            denoiser = Denoiser(model, where, how, VARIANTS[name.removeprefix("1 GPU ")], torch.bfloat16)
            for _ in range(3):
                out = denoiser(x, t, prompt)
            error = ((out.float() - reference).norm() / reference.norm()).item()
            torch.cuda.synchronize()
            warm = time.perf_counter() - started
            times = timed(functools.partial(denoiser, x, t, prompt), a.count)
            again = ((denoiser(x, t, prompt).float() - reference).norm() / reference.norm()).item()
            peak = torch.cuda.max_memory_allocated() / 2**30
            log(
                f"RESULT text {text:4d} {name:18s} median {statistics.median(times):7.2f} min {min(times):7.2f} "
                f"max {max(times):7.2f} ms  error {error:.2e} {again:.2e}  warm-up {warm:.1f} s  peak {peak:.1f} GiB"
            )
            if a.profile == name:
                from torch.profiler import ProfilerActivity, profile

                with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                    denoiser(x, t, prompt)
                    torch.cuda.synchronize()
                table = profiler.key_averages().table(sort_by="cuda_time_total", row_limit=24, max_name_column_width=70)
                log("\n".join(line[:72] + line[-75:] for line in table.splitlines()))
            del denoiser
            torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
