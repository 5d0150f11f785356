"""`demo`: the main job on what every machine has - CPU ranks and a tiny random FLUX file - checked against one rank."""

import argparse
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ..config import ModelSpec, Settings
from ..devices import Devices, local_devices
from ..models.synthetic import TINY_FLUX, write_checkpoint
from ..planner import plan
from ..pool import Pool, Progress, Session
from ..prompt import Prompt
from .arguments import add_gpus
from .preview import latent_picture

TOLERANCE = 2e-5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_gpus(parser, default="cpu:2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=512, help="edge of the image in pixels (default 512)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for checkpoint and picture")


def run(arguments: argparse.Namespace) -> int:
    devices = local_devices(arguments.gpus)
    arguments.output.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.output / "tiny_flux.safetensors"
    write_checkpoint(str(checkpoint), TINY_FLUX)
    print(f"wrote {checkpoint}: FLUX.1 layout, hidden {TINY_FLUX.hidden}, 2 + 2 blocks, random weights")

    shared = _sample(devices, str(checkpoint), arguments)
    alone = _sample(devices.first(1), str(checkpoint), arguments)

    picture = arguments.output / "preview.png"
    latent_picture(shared[0]).save(picture)
    difference = ((shared - alone).abs().max() / alone.abs().max()).item()
    print(f"wrote {picture}: the latents' principal components (the weights are random, so the picture is, too)")
    agree = difference <= TOLERANCE
    verdict = f"equal to rounding: below {TOLERANCE:.0e}" if agree else f"above {TOLERANCE:.0e}: the ranks do not agree"
    print(f"largest difference between {devices.ranks} ranks and 1, relative to the latents' max: ", end="")
    print(f"{difference:.1e} ({verdict})")
    return 0 if agree else 1


def _sample(devices: Devices, checkpoint: str, arguments: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    edge = arguments.size // 8
    noise = torch.randn(1, 16, edge, edge, generator=generator)
    prompt = Prompt(
        torch.randn(1, 64, TINY_FLUX.context, generator=generator),
        torch.randn(1, TINY_FLUX.pooled, generator=generator),
        torch.tensor([3.5]),
    )
    layout = plan(devices.ranks, TINY_FLUX.heads)
    session = Session(
        Pool(devices), ModelSpec.of_file(checkpoint, storage=None, compute="float32"), (layout,), Settings()
    )
    bar = tqdm(total=arguments.steps, desc=f"{devices}, {layout}", unit="step")

    def step(event, _tensors) -> None:
        bar.set_postfix_str(f"{event.seconds * 1000:.0f} ms/step")
        bar.update()

    started = time.perf_counter()
    try:
        latents = session.sample(
            noise,
            torch.linspace(1, 0, arguments.steps + 1),
            sampler="euler",
            positive=prompt,
            progress=Progress(step=step, phase=lambda text: bar.set_postfix_str(text)),
        )
    finally:
        bar.close()
        session.pool.close()
    print(f"{devices}: {time.perf_counter() - started:.1f} s with start-up")
    return latents
