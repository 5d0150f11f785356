"""`verify`: what each lossy option costs in exactness, on your own file and devices, and in pictures of the small model
that is shipped: the latents of another file cannot be looked at without its VAE and a text encoder."""

import argparse
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import torch

from .. import shapes
from ..attention.lossy import installed
from ..config import Layout, ModelSpec, Settings
from ..devices import Devices, local_devices
from ..errors import Cancelled, FastUSPError
from ..models.files import read_model
from ..planner import plan
from ..pool import Pool, Progress, Session
from ..protocol import Done
from .arguments import add_degrees, add_gpus, add_sizes
from .bar import Watch, bar
from .inputs import BOUNDS, describe, difference, random_inputs
from .table import Column, Table

TIMESTEPS = (0.95, 0.6, 0.2)
STEPS = 28
CAPTIONS, PIXELS, PICTURE_STEPS = 6, 256, 28
"""Of the shipped model's pictures."""

_SHARED = {"fp8 wire": {"wire": "fp8"}, "int8 wire": {"wire": "int8"}}
_ANYWHERE = {"fp8 products": {"linear": "fp8"}}
_CACHES = {f"cache {kind}": {"cache": kind} for kind in ("easy", "first_block")}
_BOTH = {"int8 wire and fp8 products": {"wire": "int8", "linear": "fp8"}}
_ATTENTION = {"sage": "sage attention", "flash3-fp8": "fp8 attention"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model file")
    add_gpus(parser)
    add_degrees(parser)
    add_sizes(parser)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of the sampling runs (default {STEPS})")


def run(arguments: argparse.Namespace) -> int:
    path, devices = arguments.model, local_devices(arguments.gpus)
    _, config, spec = describe(path, devices)
    layout = plan(devices.ranks, config.heads, ulysses=arguments.ulysses, ring=arguments.ring)
    given = *random_inputs(config, arguments.size, arguments.text), config.timestep_scale
    print(
        f"{path}: {config.family}, {spec.compute}; {layout} on {devices}; {'x'.join(map(str, arguments.size))} px, "
        f"{arguments.text} text tokens of random values"
    )
    table = Table(
        Column("relative (Frobenius) difference", 58),
        *(Column(f"t = {t}", 8, ".1e") for t in TIMESTEPS),
        Column(f"latents after {arguments.steps} steps", 23, ".1e"),
        Column("pictures, dB", 12, ".1f"),
        Column("captions met", 12, "d"),
        Column("steps skipped"),
    )
    print(table.head())

    options = options_of(devices) | _CACHES
    with closing(Pool(devices)) as pool:
        exact = results(Session(pool, spec, (layout,), Settings()), given, arguments.steps, "exact", bar)
        rows = {
            name: attempt(Session(pool, spec, (layout,), Settings(**o)), given, arguments.steps, name, bar)
            for name, o in options.items()
        }
        drawn = {name: _pictures(pool, spec.compute, Settings(**o)) for name, o in ({"": {}} | options).items()}
    shown = drawn.pop("")
    for name, result in rows.items():
        print(_line(table, f"{name}, against exact", result, exact, drawn[name], shown))
    print(
        f"pictures: {CAPTIONS} of {shapes.MODEL.name}, {PIXELS} x {PIXELS}, {PICTURE_STEPS} steps less those "
        f"that are skipped; exact ones meet {_met(shown)} captions"
    )
    if devices.ranks == 1:
        return 0
    with closing(Pool(devices.first(1))) as pool:
        alone = attempt(
            Session(pool, spec, (Layout(ulysses=1, ring=1),), Settings()), given, arguments.steps, "one rank", bar
        )
        by_one = _pictures(pool, spec.compute, Settings())
    print(_line(table, f"{devices.ranks} ranks, against one", exact, alone, shown, by_one))
    if isinstance(alone, str):
        return 1
    worst = max(difference(a, b) for a, b in zip(exact[:-1], alone[:-1], strict=True))
    if not worst <= BOUNDS[spec.compute]:
        print(f"an evaluation differs by {worst:.1e}, above {BOUNDS[spec.compute]:.0e}: the ranks do not agree")
        return 1
    return 0


def options_of(devices: Devices) -> dict[str, dict[str, str]]:
    """Returns the options in 8 bits that are measured, alone and together, by what the rows say: all that these devices
    may have and, of attention, what is installed."""
    options = (_SHARED if devices.ranks > 1 else {}) | _ANYWHERE | (_BOTH if devices.ranks > 1 else {})
    (together, values), attentions = list(options.items())[-1], installed() if devices.gpus else []
    for attention in attentions:
        options[_ATTENTION[attention]] = {"attention": attention}
    for attention in attentions:
        options[f"{together}, {_ATTENTION[attention]}"] = values | {"attention": attention}
    return options


def attempt(session: Session, given, steps: int, name: str, watch: Watch) -> list[torch.Tensor] | str:
    """Returns `results`, or why there are none. Raises Cancelled where whoever watches interrupts it."""
    try:
        return results(session, given, steps, name, watch)
    except Cancelled:
        raise
    except FastUSPError as error:
        return str(error)


def results(session: Session, given, steps: int, name: str, watch: Watch) -> list[torch.Tensor]:
    """Returns the velocities at TIMESTEPS, then the latents after `steps`. given: latents, a prompt, the timestep at
    sigma 1."""
    x, prompt, scale = given
    with watch(name, len(TIMESTEPS) + steps) as watched:
        quiet = replace(watched, step=lambda *_: None)
        found = []
        for timestep in TIMESTEPS:
            at = torch.tensor([scale * timestep])
            found.append(session.evaluate(x, at, prompt, quiet))
            watched.step(None, {})
        sigmas = torch.linspace(1, 0, steps + 1)
        more = {"timestep_scale": scale, "progress": watched}
        found.append(session.sample(x, sigmas, sampler="euler", positive=prompt, **more))
    return found


class _Drawn(NamedTuple):
    """Pictures (CAPTIONS, 3, h, w) of the shipped model, and how many of their steps a cache skipped."""

    pictures: torch.Tensor
    skipped: int


def _pictures(pool: Pool, compute: str, settings: Settings) -> _Drawn | str:
    """Draws some, or returns why there are none."""
    config = read_model(str(shapes.MODEL)).config
    spec = ModelSpec.of_file(str(shapes.MODEL), storage=None, compute=compute)
    edge = PIXELS // config.downscale
    noise = torch.randn(CAPTIONS, 16, edge, edge, generator=torch.Generator().manual_seed(0))
    session = Session(pool, spec, (plan(pool.devices.ranks, config.heads),), settings)
    sigmas, prompt = torch.linspace(1, 0, PICTURE_STEPS + 1), shapes.prompt(shapes.examples(CAPTIONS))
    told: list[Done] = []
    try:
        latents = session.sample(noise, sigmas, sampler="euler", positive=prompt, progress=Progress(done=told.append))
    except FastUSPError as error:
        return str(error)
    return _Drawn(shapes.decode(latents), told[-1].skipped)


def _met(drawn: _Drawn | str) -> int | None:
    if isinstance(drawn, str):
        return None
    return sum(not shapes.unmet(*pair) for pair in zip(shapes.examples(CAPTIONS), drawn.pictures, strict=True))


def _line(table: Table, label: str, found, wanted, drawn: _Drawn | str, shown: _Drawn | str) -> str:
    """found, wanted: results of two runs; drawn, shown: their pictures; or why there are none."""
    for result in (found, wanted):
        if isinstance(result, str):
            return Table(table.columns[0], Column("why")).row(label, f"not run: {result.splitlines()[0]}")
    known = not isinstance(drawn, str) and not isinstance(shown, str)
    decibels = shapes.psnr(drawn.pictures, shown.pictures) if known else None
    skipped = f"{drawn.skipped} of {PICTURE_STEPS}" if known and drawn.skipped else ""
    differences = (difference(a, b) for a, b in zip(found, wanted, strict=True))
    return table.row(label, *differences, decibels, _met(drawn), skipped)
