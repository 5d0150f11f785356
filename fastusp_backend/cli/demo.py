"""`demo`: a picture by its caption, drawn with the model that is shipped: by one CPU rank and by several, which must
draw the same."""

import argparse
import statistics
from contextlib import closing
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from .. import shapes
from ..comm.shards import SequenceShards
from ..config import Layout, ModelSpec, Settings
from ..devices import Devices, local_devices
from ..errors import RequestError
from ..models.cost import step_cost
from ..models.family import FamilyConfig
from ..models.files import read_model
from ..planner import plan
from ..pool import Pool, Progress, Session
from .arguments import add_gpus
from .table import Column, fitted

TOLERANCE = 2e-5
"""Of the latents' largest value: rounding in another order."""
MAGNIFIED = 1000
SMALLEST, LARGEST, BEST = 128, 512, 256
"""Edges in pixels. Most that the model was trained on were of the last."""
WARM = 3
"""Steps that are not timed: compiling, first touches of memory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_gpus(parser, default="cpu:2")
    parser.add_argument("--prompt", default="a red circle left of a blue square", help=shapes.GRAMMAR)
    parser.add_argument("--steps", type=int, default=20, help="default 20")
    parser.add_argument(
        "--size",
        type=int,
        default=BEST,
        help=f"edge of the image in pixels, a multiple of 16 (default {BEST}, the best)",
    )
    parser.add_argument("--seed", type=int, default=2, help="of the noise (default 2)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the picture")


def run(arguments: argparse.Namespace) -> int:
    if arguments.steps < 1:
        raise RequestError(f"Give --steps of 1 or more, not {arguments.steps}")
    if arguments.size not in range(SMALLEST, LARGEST + 1, 16):
        raise RequestError(f"Give --size a multiple of 16 from {SMALLEST} to {LARGEST}, not {arguments.size}")
    caption = shapes.Caption.read(arguments.prompt)
    devices = local_devices(arguments.gpus)
    if devices.ranks == 1:
        raise RequestError(f"Give --gpus two or more devices, such as cpu:2, to compare with one: {devices} is one")
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"Give --output a folder that can be made, not {arguments.output}: {error.strerror}"
        ) from error
    config = read_model(str(shapes.MODEL)).config
    alone, one = _sample(devices.first(1), config, caption, arguments)
    shared, several = _sample(devices, config, caption, arguments)

    pictures = [shapes.decode(latents)[0] for latents in (alone, shared)]
    magnified = ((pictures[1] - pictures[0]).abs() * MAGNIFIED).clamp(0, 1)
    path = arguments.output / "demo.png"
    beside = torch.cat([*pictures, magnified], dim=-1)
    Image.fromarray((beside * 255).round().byte().permute(1, 2, 0).numpy()).save(path)

    heads = Column("ranks"), Column("layout"), Column("ms a step", format=".0f"), Column("tokens of a rank", format="d")
    print(fitted((*heads, Column("kB that it sends a step", format=".0f")), [one, several]))
    if not devices.gpus:
        print("CPU ranks share this machine's cores: they show that ranks agree, not how fast GPUs are")
    print(f"wrote {path}: {caption!s}, by 1 rank | by {devices.ranks} ranks | what differs, times {MAGNIFIED}")
    difference = ((shared - alone).abs().max() / alone.abs().max()).item()
    agree, unmet = difference <= TOLERANCE, shapes.unmet(caption, pictures[1])
    print(f"largest difference of latents: {difference:.1e} of the largest value, ", end="")
    print("rounding" if agree else f"above {TOLERANCE:.0e}: the ranks do not agree")
    if unmet and agree:
        other = f"--size {BEST}" if arguments.size != BEST else "another --seed"
        print(f"FastUSP works: the ranks agree. The demo's model missed this caption: try {other}")
    print(f"checked in pixels: {'; '.join(unmet) or 'the picture is what its caption says'}")
    return 0 if agree and not unmet else 1


def _sample(
    devices: Devices, config: FamilyConfig, caption: shapes.Caption, arguments: argparse.Namespace
) -> tuple[torch.Tensor, tuple]:
    """Returns latents, and a row of the table."""
    edge = arguments.size // config.downscale
    noise = torch.randn(1, 16, edge, edge, generator=torch.Generator().manual_seed(arguments.seed))
    layout, seconds = plan(devices.ranks, config.heads), []
    bar = tqdm(total=arguments.steps, desc=f"{devices}, {layout}", unit="step")

    def step(event, _tensors) -> None:
        if not seconds:
            bar.set_postfix_str("sampling")
        seconds.append(event.seconds)
        bar.update()

    spec = ModelSpec.of_file(str(shapes.MODEL), storage=None, compute="float32")
    with closing(bar), closing(Pool(devices)) as pool:
        latents = Session(pool, spec, (layout,), Settings()).sample(
            noise,
            torch.linspace(1, 0, arguments.steps + 1),
            sampler="euler",
            positive=shapes.prompt([caption]),
            progress=Progress(step=step, phase=lambda text: bar.set_postfix_str(text)),
        )
    return latents, _row(config, layout, arguments.size, seconds)


def _row(config: FamilyConfig, layout: Layout, size: int, seconds: list[float]) -> tuple:
    tokens = (size // config.downscale // config.patch) ** 2
    local = SequenceShards(layout, shapes.TOKENS, tokens).local
    cost = step_cost(config, layout, size=(size, size), text=shapes.TOKENS)
    of_float32 = 2 * cost.sent_bytes
    warm = statistics.median(seconds[WARM:] or seconds) * 1000
    return str(layout.ranks), str(layout), warm, local, of_float32 / 1000
