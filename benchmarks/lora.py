"""How long a LoRA takes: FLUX.1-dev's size, random weights, through a pool, as ComfyUI would send it.

    python benchmarks/lora.py --folder /tmp --gpus 0 --rank 64

Writes a file of 24 GB under --folder, and removes it. Prints the LoRA's size and seconds per request: an evaluation
with no change of patches, with the LoRA put on, with its strength changed, with it taken off.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import paths  # noqa: F401
import torch
from files import write_model

from fastusp_backend.config import Layout, ModelSpec, Settings, WeightPatch
from fastusp_backend.devices import Devices
from fastusp_backend.models.files import read_model
from fastusp_backend.models.synthetic import FLUX_DEV
from fastusp_backend.pool import NO_PATCHES, Pool, Progress, Session, WeightPatches, name_of
from fastusp_backend.prompt import Prompt


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a file's tensors, by the file's names."""
    return {name: info.shape for name, info in read_model(str(path)).header.items()}


def lora(shapes: dict[str, tuple[int, ...]], rank: int) -> WeightPatches:
    """Makes a LoRA of every matrix in the blocks except the modulations, in bf16."""
    weights, tensors = {}, {}
    for name, shape in shapes.items():
        if len(shape) == 2 and "_blocks." in name and "mod" not in name:
            up, down = torch.randn(shape[0], rank).bfloat16() * 0.01, torch.randn(rank, shape[1]).bfloat16() * 0.01
            tensors |= {name_of(up): up, name_of(down): down}
            roles = {"up": name_of(up), "down": name_of(down)}
            weights[name] = (WeightPatch(kind="lora", tensors=roles, strength=1.0),)
    return WeightPatches(weights, tensors)


def with_strength(patches: WeightPatches, strength: float) -> WeightPatches:
    weights = {
        name: tuple(WeightPatch(kind=p.kind, tensors=p.tensors, strength=strength) for p in wanted)
        for name, wanted in patches.weights.items()
    }
    return WeightPatches(weights, patches.tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--gpus", default="0", help="indices, such as 0,1")
    parser.add_argument("--rank", type=int, default=64)
    options = parser.parse_args()
    gpus = tuple(map(int, options.gpus.split(",")))
    x, timestep = torch.randn(1, 16, 128, 128), torch.tensor([0.7])
    prompt = Prompt(torch.randn(1, 512, 4096), torch.randn(1, 768), torch.tensor([3.5]))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "flux.safetensors"
        write_model(path, FLUX_DEV, torch.device("cuda"))
        patches = lora(shapes_of(path), options.rank)
        print(f"LoRA: {sum(t.nbytes for t in patches.tensors.values()) / 1e6:.0f} MB, {len(patches.weights)} weights")
        pool = Pool(Devices(ranks=len(gpus), gpus=gpus))
        spec = ModelSpec.of_file(str(path), storage="bfloat16", compute="bfloat16")
        base = Session(pool, spec, (Layout(ulysses=len(gpus), ring=1),), Settings())
        try:
            for label, wanted in (
                *((f"evaluation {i}", NO_PATCHES) for i in (1, 2, 3, 4)),
                ("LoRA on", patches),
                ("unchanged", patches),
                ("strength changed", with_strength(patches, 0.5)),
                ("taken off", NO_PATCHES),
                ("unchanged", NO_PATCHES),
                ("LoRA on", patches),
                ("taken off", NO_PATCHES),
            ):
                started = time.perf_counter()
                replace(base, patches=wanted).evaluate(x, timestep, prompt, Progress())
                print(f"{label}: {time.perf_counter() - started:.3f} s", flush=True)
            print("\n".join(line for line in log_of(pool) if "patch set" in line))
        finally:
            pool.close()


def log_of(pool: Pool) -> list[str]:
    return (pool._workers.run_dir.path / "pool.log").read_text().splitlines()


if __name__ == "__main__":
    main()
