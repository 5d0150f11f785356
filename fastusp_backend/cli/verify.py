"""`verify`: what each lossy option costs in exactness, on your own file and devices."""

import argparse
from contextlib import closing
from dataclasses import replace

import torch

from ..config import Layout, Settings
from ..devices import local_devices
from ..errors import Cancelled, FastUSPError
from ..planner import plan
from ..pool import Pool, Session
from .arguments import add_degrees, add_gpus, add_sizes
from .bar import Watch, bar
from .inputs import BOUNDS, describe, difference, random_inputs
from .table import Column, Table

TIMESTEPS = (0.95, 0.6, 0.2)
STEPS = 28

_SHARED = {"fp8 wire": {"wire": "fp8"}, "int8 wire": {"wire": "int8"}}
_ANYWHERE = {"fp8 products": {"linear": "fp8"}}
_BOTH = {"int8 wire and fp8 products": {"wire": "int8", "linear": "fp8"}}


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
        Column("relative (Frobenius) difference", 41),
        *(Column(f"t = {t}", 8, ".1e") for t in TIMESTEPS),
        Column(f"latents after {arguments.steps} steps", format=".1e"),
    )
    print(table.head())

    options = (_SHARED if devices.ranks > 1 else {}) | _ANYWHERE | (_BOTH if devices.ranks > 1 else {})
    with closing(Pool(devices)) as pool:
        exact = results(Session(pool, spec, (layout,), Settings()), given, arguments.steps, "exact", bar)
        rows = {
            name: attempt(Session(pool, spec, (layout,), Settings(**o)), given, arguments.steps, name, bar)
            for name, o in options.items()
        }
    for name, result in rows.items():
        print(_line(table, f"{name}, against exact", result, exact))
    if devices.ranks == 1:
        return 0
    with closing(Pool(devices.first(1))) as pool:
        alone = attempt(
            Session(pool, spec, (Layout(ulysses=1, ring=1),), Settings()), given, arguments.steps, "one rank", bar
        )
    print(_line(table, f"{devices.ranks} ranks, against one", exact, alone))
    if isinstance(alone, str):
        return 1
    worst = max(difference(a, b) for a, b in zip(exact[:-1], alone[:-1], strict=True))
    if not worst <= BOUNDS[spec.compute]:
        print(f"an evaluation differs by {worst:.1e}, above {BOUNDS[spec.compute]:.0e}: the ranks do not agree")
        return 1
    return 0


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


def _line(table: Table, label: str, found: list[torch.Tensor] | str, wanted: list[torch.Tensor] | str) -> str:
    for result in (found, wanted):
        if isinstance(result, str):
            return Table(table.columns[0], Column("why")).row(label, f"not run: {result.splitlines()[0]}")
    return table.row(label, *(difference(a, b) for a, b in zip(found, wanted, strict=True)))
