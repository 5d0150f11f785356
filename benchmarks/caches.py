"""Whole sampling runs with and without a cache, on a warm pool: seconds a run, and how many evaluations were skipped.

    python benchmarks/caches.py --gpus 0,1 --model flux
    python benchmarks/caches.py --gpus 0,1 --peers
    python benchmarks/caches.py --gpus cpu:2 --tiny --size 64 --text 9 --steps 6

Random weights, of which a cache may skip none or all: so the rows are what a run costs where it skips nothing, which is
the overhead, and where it skips all that it may. `quality.py` says how many a model that draws skips, at what error.
A cache may skip all steps but the first two, with all engines.
With `--peers` (FLUX.1) other engines' caches do the same, then all draw pictures of the shipped model at several
thresholds; the last table joins both: what a run costs where its pictures differ by no more than so many dB.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import paths  # noqa: F401
import torch
from cached_peers import CACHES, MODULES, WARM_UP, captioned
from common import CONFIGS, MODELS, Case, Inputs, random_inputs
from files import write_model
from process_sets import ProcessSet, run_all

from fastusp_backend import shapes
from fastusp_backend.cli.table import Column, Table
from fastusp_backend.config import ModelSpec, Settings
from fastusp_backend.devices import parse_devices
from fastusp_backend.models.family import FamilyConfig
from fastusp_backend.models.files import read_model
from fastusp_backend.planner import plan
from fastusp_backend.pool import Pool, Progress, Session
from fastusp_backend.prompt import Prompt

NOTHING, ALL = 1e-9, 1e9
"""Thresholds that no difference is below, and every one: with none at all, some engines would not even compare."""
ROWS = {
    "off": {},
    "easy, skips nothing": {"cache": "easy", "cache_threshold": NOTHING},
    "first_block, skips nothing": {"cache": "first_block", "cache_threshold": NOTHING},
    "easy, skips all": {"cache": "easy", "cache_threshold": ALL},
    "first_block, skips all": {"cache": "first_block", "cache_threshold": ALL},
    "off again": {},
}
THRESHOLDS = (0.05, 0.08, 0.12, 0.17, 0.2, 0.24, 0.28, 0.34, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
"""Of the pictures."""
BUDGETS = (50, 45, 40, 35, 30)
"""In dB."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one engine's runs take, in seconds: without a cache, with one that skips nothing, and where it skips
    as many as it may, `skipped` steps."""

    off: float
    nothing: float
    most: float
    skipped: int

    def of(self, skipped: float) -> float:
        """Returns the seconds of a run that skips so many steps, each of which saves alike."""
        return self.nothing - (self.nothing - self.most) * skipped / self.skipped


@dataclass(frozen=True, slots=True)
class Drawn:
    """Pictures at one threshold: steps that were skipped, and how far they are from those of the same engine without a
    cache, in dB."""

    threshold: float
    skipped: int
    psnr: float


Engines = dict[str, tuple[Cost, list[Drawn]]]
Run = Callable[[dict], tuple[torch.Tensor, float, int]]


def run_of(pool: Pool, spec: ModelSpec, given: Inputs, a: argparse.Namespace, config: FamilyConfig) -> Run:
    """Returns run(options), which samples and returns (latents, seconds, evaluations skipped)."""
    (tensors,) = given.prompts
    prompt, sigmas = Prompt(tensors.context, tensors.y, tensors.guidance), torch.linspace(1, 0, a.steps + 1)
    layout = plan(pool.devices.ranks, config.heads)
    allowed = {"cache_start": max(0.0, (WARM_UP - 0.5) / a.steps), "cache_end": 1.0}  # between two steps

    def run(options: dict) -> tuple[torch.Tensor, float, int]:
        settings = Settings(**options | (allowed if options else {}))
        session, told, began = Session(pool, spec, (layout,), settings), [], time.perf_counter()
        more = {"timestep_scale": config.timestep_scale, "progress": Progress(done=told.append)}
        x = session.sample(given.x, sigmas, sampler="euler", positive=prompt, **more)
        return x, time.perf_counter() - began, told[-1].skipped

    return run


def ours_timed(pool: Pool, a: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Cost:
    config = CONFIGS[a.model, a.tiny]
    given = random_inputs(config, Case(a.size, (a.text,), 1), torch.device("cpu"), dtype)
    columns = Column("cache"), Column("s a run", format=".3f"), Column("x off", format=".2f"), Column("skipped")
    table = Table(*columns, markdown=True)
    print(table.head(), flush=True)
    found = {}
    with tempfile.TemporaryDirectory(prefix="fastusp-bench-") as folder:
        path = Path(folder) / "model.safetensors"
        write_model(path, config, device, dtype)
        spec = ModelSpec.of_file(str(path), storage=None, compute=str(dtype).removeprefix("torch."))
        run = run_of(pool, spec, given, a, config)
        for name, options in ROWS.items():
            runs = [run(options) for _ in range(1 + a.runs)]
            seconds, skipped = statistics.median(each[1] for each in runs[1:]), runs[-1][2]
            found[name] = seconds, skipped
            print(table.row(name, seconds, found["off"][0] / seconds, f"{skipped} of {a.steps}"), flush=True)
    nothing, (least, skipped) = found["first_block, skips nothing"][0], found["first_block, skips all"]
    return Cost(found["off"][0], nothing, least, skipped)


def ours_drawn(pool: Pool, a: argparse.Namespace, dtype: torch.dtype) -> list[Drawn]:
    spec = ModelSpec.of_file(str(shapes.MODEL), storage=None, compute=str(dtype).removeprefix("torch."))
    given = captioned(a.captions, torch.device("cpu"), dtype)
    run = run_of(pool, spec, given, a, read_model(str(shapes.MODEL)).config)
    wanted, found = shapes.decode(run({})[0]), []
    for threshold in THRESHOLDS:
        x, _, skipped = run({"cache": "first_block", "cache_threshold": threshold})
        found.append(Drawn(threshold, skipped, shapes.psnr(shapes.decode(x), wanted)))
    return found


def peers(a: argparse.Namespace, ranks: int, cuda: bool) -> Iterator[tuple[str, Cost, list[Drawn]]]:
    """Runs each engine's cache in processes of its own: once in parallel, timed, and once on one rank, for pictures.
    Yields each engine's figures as it has them: what follows may run out of time."""
    case = {"size": a.size, "texts": (a.text,), "batch": 1}
    job = {"side": "cached_peers", "model": "flux", "device": "cuda" if cuda else "cpu", "cases": [case]}
    job |= {"steps": a.steps, "profile": []}
    for name in CACHES if a.peers == "all" else [a.peers]:
        timed = {"who": name, "tiny": a.tiny, "count": a.runs, "thresholds": [NOTHING, ALL]}
        drawn = {"who": name, "tiny": True, "count": 1, "thresholds": THRESHOLDS}
        more = {"who": name, "link": "nvlink", "module": MODULES[name]}
        sets = [
            ProcessSet(job=job | timed | {"pictures": 0, "compiled": cuda}, ranks=ranks, **more),
            ProcessSet(job=job | drawn | {"pictures": a.captions, "compiled": False}, ranks=1, **more),
        ]
        with tempfile.TemporaryDirectory(prefix="fastusp-bench-") as folder:
            rows = run_all(sets, Path(folder), seconds=200, minutes=8).rows
            timed, drawn = ([row for row in rows if row["set"] == number] for number in (0, 1))
            if any("failed" in row for row in timed + drawn) or len(timed + drawn) < 4 + len(THRESHOLDS):
                continue  # which was said when it happened
            off, nothing, all_ = (row["median"] / 1000 for row in timed)
            pictures = [shapes.decode(torch.load(row["output"])) for row in drawn]
        compared = [
            Drawn(threshold, row["skipped"], shapes.psnr(picture, pictures[0]))
            for threshold, row, picture in zip(THRESHOLDS, drawn[1:], pictures[1:], strict=True)
        ]
        yield name, Cost(off, nothing, all_, timed[-1]["skipped"]), compared


def joined(engines: Engines, steps: int) -> None:
    names = "off", "skips nothing", "skips all"
    columns = Column("engine"), *(Column(f"{name}, s", format=".3f") for name in names), Column("skipped")
    table = Table(*columns, markdown=True)
    print(f"\n{table.head()}")
    for name, (cost, _) in engines.items():
        print(table.row(name, cost.off, cost.nothing, cost.most, f"{cost.skipped} of {steps}"))
    table = Table(Column("engine"), *(Column(f"{threshold:g}") for threshold in THRESHOLDS), markdown=True)
    print(
        f"\nPictures of the shipped model: steps of {steps} that were skipped, dB, at each threshold\n\n{table.head()}"
    )
    for name, (_, drawn) in engines.items():
        print(table.row(name, *(f"{each.skipped}: {each.psnr:.1f}" for each in drawn)))
    table = Table(Column("engine"), *(Column(f"{budget} dB") for budget in BUDGETS), markdown=True)
    print(f"\nSeconds of a run whose pictures differ by no more (steps skipped)\n\n{table.head()}")
    for name, (cost, drawn) in engines.items():
        most = (max((each.skipped for each in drawn if each.psnr >= budget), default=0) for budget in BUDGETS)
        print(table.row(name, *(f"{cost.of(n) if n else cost.off:.3f} ({n})" for n in most)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="all", help="as USP Loader's `gpus`")
    parser.add_argument("--model", choices=MODELS, default="flux")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--runs", type=int, default=3, help="of each row, beside the first, which may capture")
    parser.add_argument(
        "--peers",
        nargs="?",
        const="all",
        help=f"also pictures, and other engines' caches: all, or one of {list(CACHES)}",
    )
    parser.add_argument("--captions", type=int, default=48, help="pictures of the shipped model (default 48)")
    a = parser.parse_args()
    if a.peers and a.model != "flux":
        raise SystemExit(f"--model {a.model}: with --peers, give flux, which the other engines' caches are asked for")
    if a.peers and a.peers not in ("all", *CACHES):
        raise SystemExit(f"--peers: unknown {a.peers}; choose from: all, {', '.join(CACHES)}")
    devices = parse_devices(a.gpus)
    device = torch.device("cuda") if devices.gpus else torch.device("cpu")
    dtype = torch.bfloat16 if devices.gpus else torch.float32
    print(f"{a.model}, {a.size} px, text {a.text}, {a.steps} steps of euler; {devices}, torch {torch.__version__}")
    pool = Pool(devices)
    try:
        cost = ours_timed(pool, a, device, dtype)
        drawn = ours_drawn(pool, a, dtype) if a.peers else []
    finally:
        pool.close()
    if a.peers:
        engines: Engines = {"FastUSP first_block": (cost, drawn)}
        joined(engines, a.steps)
        for name, *figures in peers(a, devices.ranks, bool(devices.gpus)):
            engines[name] = tuple(figures)
            joined({name: engines[name]}, a.steps)
        joined(engines, a.steps)


if __name__ == "__main__":
    main()
