"""`bench`: how fast a file is on 1, 2, ... all devices of this machine, or a server's, and which settings are best."""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import msgspec
import torch

from ..attention.lossy import installed
from ..config import Layout, ModelSpec, Settings
from ..devices import Devices, ServerDevices
from ..errors import PoolError, RequestError
from ..planner import legal_layouts
from ..pool import Pool, Progress, Session
from ..prompt import Prompt
from .arguments import add_sizes
from .bar import Watch, bar
from .inputs import describe, random_inputs
from .limit import limit
from .served import add_devices, devices_of, links
from .table import Column, Table

WARM_UP = {"cuda": 3, "cpu": 1}
"""Steps before those that count: GPUs compile in the first and capture in the second."""
MARGIN = 0.03
"""What is less than this much faster is no reason for more GPUs, or for 8 bits."""
TABLE = Table(
    Column("ranks", 5, "d"),
    Column("layout", 19),
    Column("wire", 5),
    Column("linear", 6),
    Column("attention", 10),
    Column("ms/evaluation", 13, ".1f"),
    Column("x one rank", 10, ".2f"),
    Column("first 2 steps s", 15, ".2f"),
    Column("GB/rank", 7, ".2f"),
    Column("exchanges"),
)
NOT_RUN = Table(*TABLE.columns[:5], Column("why"))
WIRES, LINEARS = ("exact", "int8", "fp8"), ("exact", "fp8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    layout: Layout
    settings: Settings
    automatic: bool = True
    """Whether FastUSP takes this layout by itself."""
    seconds: float | None = None
    """The median time of an evaluation."""
    first: float = 0.0
    """Seconds of the first two steps."""
    nbytes: int = 0
    """Bytes of the weights on the rank that has most."""
    transport: str = ""
    """As in `protocol.Held`."""
    problem: str = ""
    """Why there are none of these figures."""

    @property
    def exact(self) -> bool:
        return self.settings.lossless

    @property
    def name(self) -> str:
        attention = "" if self.settings.attention == "auto" else f", {self.settings.attention} attention"
        return f"{self.layout}, {self.settings.wire} wire, {self.settings.linear} products{attention}"

    def choice(self, devices: Devices) -> str:
        """Says what to set for it in ComfyUI, and what that gives."""
        some = devices.first(self.layout.ranks)
        gpus = ",".join(map(str, some.gpus)) or some
        degrees = "ulysses = 0, ring = 0 (automatic)"
        if not self.automatic:
            degrees = (
                f"ulysses = {self.layout.ulysses}, ring = {self.layout.ring} (for cfg 1 and one image: degrees that "
                f"are set turn batch groups off)"
            )
        return (
            f"gpus = {gpus} ({some.ranks} rank{'s' * (some.ranks > 1)}), {degrees}, wire = {self.settings.wire}, "
            f"linear = {self.settings.linear}, attention = {self.settings.attention}: {self.seconds * 1000:.1f} ms"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model file")
    add_devices(parser)
    add_sizes(parser)
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed in each row (default 8)")
    parser.add_argument(
        "--layouts", choices=("best", "all"), default="best", help="all: every legal layout (default best)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=1800.0,
        help="time limit of each row, loading and compiling included (default 1800)",
    )


def run(arguments: argparse.Namespace) -> int:
    path, devices = arguments.model, devices_of(arguments.gpus, arguments.key)
    if arguments.steps < 1:
        raise RequestError(f"--steps {arguments.steps}: at least 1 step must be timed")
    _, config, spec = describe(path, devices)
    bench = Bench(
        spec=spec,
        given=random_inputs(config, arguments.size, arguments.text),
        steps=arguments.steps,
        every_layout=arguments.layouts == "all",
        seconds=arguments.seconds,
    )
    print(
        f"{path}: {config.family}, {spec.compute}, on {devices}; {'x'.join(map(str, arguments.size))} px, "
        f"{arguments.text} text tokens of random values; medians of {arguments.steps} evaluations"
    )
    if isinstance(devices, ServerDevices):
        for told in links(devices, spec, config, arguments.seconds):
            print(told, flush=True)
    print(TABLE.head(), flush=True)
    rows: list[Row] = []
    for row in bench.rows(devices, config.heads):
        rows.append(row)
        print(line(row, rows[0]), flush=True)
    print("\n".join(recommend(rows, devices)))
    return 0 if any(row.seconds for row in rows) else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What is measured, and how.

    given: latents and a prompt.
    steps: how many are timed in each row.
    every_layout: whether all legal ones are, or FastUSP's own choice for each number of ranks.
    seconds: time limit of each row.
    base: the options beside those that are measured.
    crowded: whether packed weights stay as their file has them, as `Pool.crowded` says of the pool that it is for.
    """

    spec: ModelSpec
    given: tuple[torch.Tensor, Prompt]
    steps: int
    every_layout: bool = False
    seconds: float = 1800.0
    base: Settings = Settings()
    crowded: bool = False
    watch: Watch = bar

    def rows(self, devices: Devices, heads: int) -> Iterator[Row]:
        """Measures 1, 2, 4, ... of the devices, then the options on all of them; of a server's, all alone. Workers run
        between two rows alone."""
        exact = self.base.without_loss()
        for ranks in rank_counts(devices):
            layouts = legal_layouts(ranks, heads, devices.first(ranks).together)
            some = []
            with closing(self.pool(devices.first(ranks))) as pool:
                for layout in layouts if self.every_layout else layouts[:1]:
                    row = Row(layout=layout, settings=exact, automatic=layout == layouts[0])
                    some.append(self.measured(row, pool))
                    yield some[-1]
                if ranks < devices.ranks:
                    continue
                fastest = min(some, key=lambda row: row.seconds or float("inf"))
                for option in options(devices):
                    if fastest.problem and option["linear"] == "exact":
                        continue  # as large as what did not run, and nothing to be compared with
                    settings = msgspec.structs.replace(exact, **option)
                    row = Row(layout=fastest.layout, settings=settings, automatic=fastest.automatic)
                    row = self.measured(row, pool)
                    yield row
                    if row.problem and option["linear"] == "fp8" and "attention" not in option:
                        return  # these devices have no such products, or no room for them, over any wire

    def pool(self, devices: Devices) -> Pool:
        """Makes a pool to measure on; the caller closes it."""
        pool = Pool(devices)
        pool.crowded = self.crowded
        return pool

    def count(self, devices: Devices, heads: int) -> int:
        """How many rows there are at most."""
        layouts = [len(legal_layouts(n, heads)) if self.every_layout else 1 for n in rank_counts(devices)]
        return sum(layouts) + len(options(devices))

    def measured(self, row: Row, pool: Pool) -> Row:
        """Times the steps of a sampling run. What the workers refuse, die of, or take too long for is the row's
        problem. Raises Cancelled where whoever watches interrupts it."""
        x, prompt = self.given
        warm_up, seconds = WARM_UP[pool.devices.type], []
        steps = warm_up + self.steps
        try:
            with self.watch(row.name, steps) as watched, limit(pool, self.seconds) as late:

                def step(event, tensors) -> None:
                    seconds.append(event.seconds)
                    watched.step(event, tensors)

                def interrupted() -> bool:
                    return late() or watched.interrupted()

                Session(pool, self.spec, (row.layout,), row.settings).sample(
                    x,
                    torch.linspace(1, 0, steps + 1),
                    sampler="euler",
                    positive=prompt,
                    progress=Progress(step=step, phase=watched.phase, interrupted=interrupted),
                )
        except (RequestError, PoolError) as error:
            return replace(row, problem=str(error))
        held = pool.held
        return replace(
            row,
            seconds=statistics.median(seconds[warm_up:]),
            first=sum(seconds[:2]),
            nbytes=held.nbytes,
            transport=held.transport,
        )


def rank_counts(devices: Devices) -> list[int]:
    """Returns 1, 2, 4 and so on below the devices' ranks, then these; of a server, whose workers run together, these
    alone."""
    ranks = devices.ranks
    fewer = [] if isinstance(devices, ServerDevices) else [2**n for n in range(ranks.bit_length()) if 2**n < ranks]
    return [*fewer, ranks]


def options(devices: Devices) -> list[dict[str, str]]:
    """Returns what may make it faster at the price of exactness: values of `Settings`. The weights are loaded once for
    each `linear`. Attention in 8 bits, where it is installed, is timed alone and beside the rest."""
    wires, attentions = WIRES if devices.ranks > 1 else ("exact",), installed() if devices.gpus else []
    found = []
    for linear in LINEARS:
        found += [{"wire": wire, "linear": linear} for wire in wires if (wire, linear) != ("exact", "exact")]
        wire = "exact" if linear == "exact" or devices.ranks == 1 else "int8"
        found += [{"wire": wire, "linear": linear, "attention": attention} for attention in attentions]
    return found


def line(row: Row, alone: Row) -> str:
    """Returns a line of the table. alone: one rank's row, exact, where there is one."""
    what = row.layout.ranks, str(row.layout), row.settings.wire, row.settings.linear, row.settings.attention
    if row.seconds is None:
        return NOT_RUN.row(*what, f"not run: {row.problem.splitlines()[0]}")
    gain = alone.seconds / row.seconds if alone.seconds and alone.layout.ranks == 1 else "-"
    return TABLE.row(*what, row.seconds * 1000, gain, row.first, row.nbytes / 1e9, row.transport or "-")


def recommend(rows: Sequence[Row], devices: Devices) -> list[str]:
    """Says what to take by these rows: without loss, and in 8 bits where that is faster."""
    ran = [row for row in rows if row.seconds]
    if not ran:
        return ["Nothing could be measured; `python -m fastusp_backend doctor` looks for the reason."]
    found = []
    exact, quickest = best([row for row in ran if row.exact]), best(ran)
    if exact:
        most = max((row for row in ran if row.exact), key=lambda row: (row.layout.ranks, -row.seconds))
        if exact.layout.ranks < most.layout.ranks:
            few = f": more ranks gain less than {MARGIN:.0%}" if most.seconds < exact.seconds else ""
            found.append(
                f"Fewer ranks are the better choice here: {most.seconds * 1000:.1f} ms on {most.layout.ranks} ranks, "
                f"{exact.seconds * 1000:.1f} ms on {exact.layout.ranks}{few}."
            )
        found.append(f"Recommended, without loss: {exact.choice(devices)}")
    if not quickest.exact:
        gain = f", {exact.seconds / quickest.seconds:.2f} x as fast" if exact else ""
        found.append(f"In 8 bits, whose error `verify` measures: {quickest.choice(devices)}{gain}")
    return found


def best(rows: Sequence[Row]) -> Row | None:
    """Picks of rows that ran, among those as fast as the fastest, to MARGIN: exact first, then the fewest ranks, then
    the fastest."""
    near = min((row.seconds for row in rows), default=0.0) * (1 + MARGIN)
    fast = [row for row in rows if row.seconds <= near]
    return min(fast, key=lambda row: (not row.exact, row.layout.ranks, row.seconds), default=None)
