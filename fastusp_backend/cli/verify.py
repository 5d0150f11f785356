"""`verify`: what each lossy option costs in exactness, alone and together, on your file and devices, and in pictures
of the small model that is shipped: the latents of another file cannot be looked at without its VAE and a text encoder.
And which one is the fastest for how much error."""

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import torch

from .. import shapes
from ..attention.lossy import installed
from ..config import Layout, ModelSpec, Settings
from ..devices import Devices, local_devices
from ..errors import Cancelled, FastUSPError, RequestError
from ..models.files import read_model
from ..planner import plan
from ..pool import Pool, Progress, Session
from ..protocol import Done
from .arguments import add_degrees, add_gpus, add_sizes
from .bar import Watch, bar
from .bench import MARGIN
from .clock import Clock, skipping_all
from .inputs import BOUNDS, describe, difference, random_inputs
from .table import Column, Table

TIMESTEPS = (0.95, 0.6, 0.2)
STEPS = 28
CAPTIONS, PIXELS, PICTURE_STEPS = 6, 256, 28
"""Of the shipped model's pictures."""
BUDGETS = 40, 30
"""dB between pictures and exact ones, for which an option is recommended: at 40 one sees differences where they are
shown enlarged, at 30 beside each other."""
WARM_UP = 2
"""Steps before those that are timed: GPUs capture graphs in them."""

_SHARED = {"fp8 wire": {"wire": "fp8"}, "int8 wire": {"wire": "int8"}}
_ANYWHERE = {"fp8 products": {"linear": "fp8"}}
CACHES = {
    f"cache {kind}, threshold {threshold}": {"cache": kind, "cache_threshold": threshold}
    for kind, thresholds in (("easy", (0.05, 0.1, 0.2)), ("first_block", (0.1, 0.2, 0.5)))
    for threshold in thresholds
}
_BOTH = {f"{wire} wire and fp8 products": {"wire": wire, "linear": "fp8"} for wire in ("fp8", "int8")}
_ATTENTION = {"sage": "sage attention", "flash3-fp8": "fp8 attention"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model file")
    add_gpus(parser)
    add_degrees(parser)
    add_sizes(parser)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of the sampling runs (default {STEPS})")


def run(arguments: argparse.Namespace) -> int:
    path, devices = arguments.model, local_devices(arguments.gpus)
    if arguments.steps < 1:
        raise RequestError(f"Give --steps 1 or more: it is {arguments.steps}, and runs of no steps tell nothing apart")
    _, config, spec = describe(path, devices)
    layout = plan(devices.ranks, config.heads, ulysses=arguments.ulysses, ring=arguments.ring)
    given = *random_inputs(config, arguments.size, arguments.text), config.timestep_scale
    print(
        f"{path}: {config.family}, {spec.compute}; {layout} on {devices}; {'x'.join(map(str, arguments.size))} px, "
        f"{arguments.text} text tokens of random values"
    )
    table = Table(
        Column("relative (Frobenius) difference to exact values", 60),
        *(Column(f"t = {t}", 8, ".1e") for t in TIMESTEPS),
        Column(f"latents after {arguments.steps} steps", 23, ".1e"),
        Column("ms/step", 8, ".1f"),
        Column("pictures, dB", 12, ".1f"),
        Column("captions met", 12, "d"),
        Column(f"skipped of {arguments.steps}", 13, "d"),
        Column(f"of {PICTURE_STEPS} in pictures", 17, "d"),
    )
    print(table.head())

    options, clock = with_caches(options_of(devices)), Clock(bar)
    skipping = skipping_all(options)
    with closing(Pool(devices)) as pool:

        def timed(name: str, option, attempted=attempt, warm_up=WARM_UP, steps=arguments.steps):
            session = Session(pool, spec, (layout,), Settings(**option))
            if devices.gpus and isinstance(why := attempted(session, given, warm_up, name, clock), str):
                return why
            return attempted(session, given, steps, name, clock)

        exact = timed("exact", {}, results)
        found: dict[str, list[torch.Tensor] | str] = {"exact": exact}
        # The file is read once for each `linear`.
        for name in sorted(options, key=lambda name: options[name].get("linear", "")):
            found[name] = timed(name, options[name])
            if name in skipping and (most := skipping[name]).name not in found:
                found[most.name] = timed(most.name, most.option, warm_up=PICTURE_STEPS, steps=PICTURE_STEPS)
        drawn = {name: _pictures(pool, spec.compute, Settings(**o)) for name, o in ({"": {}} | options).items()}
    shown, rows = drawn.pop(""), []
    for name, option in options.items():
        result, seconds, here = found[name], clock.step(name), None
        if most := skipping.get(name):
            result = next((found[n] for n in (most.plain, most.name) if isinstance(found[n], str)), result)
            known = not isinstance(result, str) and not isinstance(drawn[name], str)
            seconds = clock.step_of(drawn[name].skipped, most) if known else None
            here = clock.skipped(name) if known else None
        row = Row.of(option, result, exact, seconds, drawn[name], shown)._replace(here=here)
        print(_line(table, name, row))
        rows.append(row)
    met = "there are none" if isinstance(shown, str) else f"exact ones meet {_met(shown)} captions"
    print(
        f"pictures: {CAPTIONS} of {shapes.MODEL.name}, {PIXELS} x {PIXELS}, {PICTURE_STEPS} steps less those "
        f"that are skipped; {met}"
    )
    for line in undrawn({"exact values": shown} | drawn):
        print(line)
    print("ms/step with a cache: where as many steps are skipped as in the pictures; empty without pictures")
    print("\n".join(recommend(rows, clock.step("exact"), _met(shown))))
    if devices.ranks == 1:
        return 0
    with closing(Pool(devices.first(1))) as pool:
        alone = attempt(
            Session(pool, spec, (Layout(ulysses=1, ring=1),), Settings()), given, arguments.steps, "one rank", bar
        )
        by_one = _pictures(pool, spec.compute, Settings())
    row = Row.of({}, exact, alone, clock.step("exact"), shown, by_one)
    print(_line(table, f"{devices.ranks} ranks, against one", row))
    if isinstance(by_one, str):
        print(f"no pictures of one rank: {by_one.splitlines()[0]}")
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
    together, attentions = _BOTH if devices.ranks > 1 else _ANYWHERE, installed() if devices.gpus else []
    options = (_SHARED if devices.ranks > 1 else {}) | _ANYWHERE | together
    for attention in attentions:
        options[_ATTENTION[attention]] = {"attention": attention}
    for attention in attentions:
        for name, values in together.items():
            options[f"{name}, {_ATTENTION[attention]}"] = values | {"attention": attention}
    return options


def with_caches(options: dict[str, dict[str, str]]) -> dict[str, dict[str, str | float]]:
    """Returns options of 8 bits, caches alone, and caches beside as many of the 8 bits as there are at a time, of both
    kinds of wire the closer one."""
    most = max(map(len, options.values()))
    together = {
        f"{name}, cache {kind}": option | {"cache": kind, "cache_threshold": Settings().cache_threshold}
        for name, option in options.items()
        if len(option) == most and option.get("wire") != "fp8"
        for kind in dict.fromkeys(of["cache"] for of in CACHES.values())
    }
    return options | CACHES | together


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


def undrawn(drawn: dict[str, _Drawn | str]) -> list[str]:
    """Says which options have no pictures, and why."""
    reasons: dict[str, list[str]] = {}
    for name, found in drawn.items():
        if isinstance(found, str):
            reasons.setdefault(found.splitlines()[0], []).append(name)
    return [
        f"no pictures of {'; '.join(names) if len(names) < len(drawn) else 'any option'}: {reason}"
        for reason, names in reasons.items()
    ]


def _met(drawn: _Drawn | str) -> int | None:
    if isinstance(drawn, str):
        return None
    return sum(not shapes.unmet(*pair) for pair in zip(shapes.examples(CAPTIONS), drawn.pictures, strict=True))


class Row(NamedTuple):
    """What an option costs and brings.

    option: values of `Settings`.
    problem: why it was not run; the rest is not known then.
    differences: relative ones of the evaluations, then of the latents.
    seconds: of a step in the mean; with a cache, of one that skips as many as the pictures'. None where not known.
    decibels: of the pictures; None where there are none. So are `met`, the captions that they meet, and `skipped`.
    skipped, here: steps that a cache skipped of the pictures, and of the file's own run; None without one.
    """

    option: dict[str, str | float]
    problem: str = ""
    differences: Sequence[float] = ()
    seconds: float | None = None
    decibels: float | None = None
    met: int | None = None
    skipped: int | None = None
    here: int | None = None

    @classmethod
    def of(cls, option, found, wanted, seconds: float | None, drawn: _Drawn | str, shown: _Drawn | str) -> "Row":
        """found, wanted: `results` of two runs; drawn, shown: their pictures; or why there are none."""
        for result in (found, wanted):
            if isinstance(result, str):
                return cls(option, result.splitlines()[0])
        differences = [difference(a, b) for a, b in zip(found, wanted, strict=True)]
        if isinstance(drawn, str) or isinstance(shown, str):
            return cls(option, "", differences, seconds)
        decibels = shapes.psnr(drawn.pictures, shown.pictures)
        skipped = drawn.skipped if "cache" in option else None
        return cls(option, "", differences, seconds, decibels, _met(drawn), skipped)

    @property
    def values(self) -> str:
        """What to set in USP Optimization Settings."""
        return ", ".join(f"{name} = {value}" for name, value in self.option.items())


def _line(table: Table, label: str, row: Row) -> str:
    if row.problem:
        return Table(table.columns[0], Column("why")).row(label, f"not run: {row.problem}")
    milliseconds = row.seconds and row.seconds * 1000
    return table.row(label, *row.differences, milliseconds, row.decibels, row.met, row.here, row.skipped)


def recommend(rows: Sequence[Row], exact: float, met: int | None) -> list[str]:
    """Says for each of BUDGETS what to set: of the rows whose pictures are so close, and meet as many captions as exact
    ones, the closest of those as fast as the fastest, to MARGIN. exact: seconds of an exact step."""
    known = [row for row in rows if row.seconds is not None and row.decibels is not None]
    if not known:
        return ["Nothing can be recommended: no option has pictures and a time of its steps."]
    said = []
    for budget in BUDGETS:
        near = [row for row in known if row.decibels >= budget and row.met >= met]
        fastest = min((row.seconds for row in near), default=exact)
        if fastest >= exact * (1 - MARGIN):
            said.append(f"For {budget} dB: exact values, {exact * 1000:.1f} ms a step; nothing so close is faster.")
            continue
        best = max((row for row in near if row.seconds <= fastest * (1 + MARGIN)), key=lambda row: row.decibels)
        said.append(
            f"For {budget} dB: {best.values}: {best.seconds * 1000:.1f} ms a step, {exact / best.seconds:.2f} x as "
            f"fast as exact values; {best.decibels:.1f} dB in the pictures, {best.differences[-1]:.1e} in the latents."
        )
    return said
