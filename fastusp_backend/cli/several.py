"""`plan --nnodes`: what a step takes on several machines, over the network between them, and on one of them."""

import argparse

from ..errors import RequestError
from ..models.prediction import CARDS, MARGIN, Link, Network, Prediction, in_milliseconds, over_pcie
from ..planner import legal_layouts, plan_batches
from .file import File
from .scaling import PROMPTS
from .table import Column, fitted

GIGABITS = 10, 25, 100, 400
WIRES = {"exact": "wire exact", "int8": "in 8 bits"}


def add_machines(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nnodes", type=int, default=1, help="how many machines, each with such GPUs (default 1)")
    parser.add_argument(
        "--network",
        type=float,
        metavar="GBIT",
        help="Gbit/s between them, as iperf3 measures it (default: a line for each of "
        f"{', '.join(map(str, GIGABITS))})",
    )


def check(arguments: argparse.Namespace) -> None:
    """Raises RequestError for values that do not go together."""
    if arguments.nnodes < 1:
        raise RequestError(f"Give --nnodes a number of machines, from 1 on, not {arguments.nnodes}")
    if arguments.network is not None and arguments.nnodes == 1:
        raise RequestError("Give --nnodes too: --network is what joins several machines")
    if arguments.network is not None and not 0 < arguments.network < 10_000:
        raise RequestError(f"Give --network Gbit/s, as 25, not {arguments.network:g}")


def layouts_across(arguments: argparse.Namespace, per_machine: int, heads: int) -> list[str]:
    """Which layouts there are on all machines."""
    ranks = per_machine * arguments.nnodes
    wish = {"ulysses": arguments.ulysses, "ring": arguments.ring, "per_machine": per_machine}
    chosen = plan_batches(ranks, heads, **wish)[-1]
    legal = ", ".join(map(str, legal_layouts(ranks, heads, per_machine)))
    return [f"{arguments.nnodes} machines of {per_machine}: {chosen}", f"legal: {legal}"]


def several(file: File, arguments: argparse.Namespace, per_machine: int, free: int, card: str) -> list[str]:
    """Says what a step is predicted to take on one machine and on all of them, and where that is no faster. free: bytes
    of each GPU that a worker has. card: of `CARDS`."""
    machines, heads = arguments.nnodes, file.config.heads
    wish = {"ulysses": arguments.ulysses, "ring": arguments.ring}
    try:
        found, kept = file.settle(per_machine, arguments.linear, free, peers=CARDS[card].nvlink is not None)
    except RequestError as error:
        return [f"{machines} machines: {error}"]
    whole = file.whole(per_machine * machines, arguments.linear)
    if whole.device_bytes > free - kept:
        more = ", or linear = fp8" if arguments.linear == "exact" and CARDS[card].fp8 else ""
        return [
            f"{machines} machines: take a smaller file{more}: weights stay whole there, which takes "
            f"{whole.device_bytes / 1e9:.1f} GB of each GPU, and {(free - kept) / 1e9:.1f} GB are free"
        ]
    link: Link = CARDS[card].nvlink or over_pcie(CARDS[card].pcie, 16)
    about = file.header, file.config
    alone = Prediction(*about, plan_batches(per_machine, heads), CARDS[card], arguments.linear, arguments.wire)
    across = plan_batches(per_machine * machines, heads, **wish, per_machine=per_machine)
    made = {wire: Prediction(*about, across, CARDS[card], arguments.linear, wire) for wire in WIRES}
    seconds = {(None, ""): [alone.seconds(found, link, prompts=n) for n in PROMPTS]}
    for gigabits in [arguments.network] if arguments.network else GIGABITS:
        network = Network(per_machine, gigabits / 8)
        for wire, each in made.items():
            seconds[gigabits, wire] = [each.seconds(whole, link, prompts=n, network=network) for n in PROMPTS]

    def named(gigabits: float | None, wire: str) -> str:
        return f"all, {gigabits:g} Gbit/s, {WIRES[wire]}" if gigabits else "one machine"

    alone_seconds = seconds[None, ""]

    def slower(both: list[float]) -> str:
        """For which prompts it is so, by more than predictions may be wrong."""
        pairs = zip(PROMPTS.values(), both, alone_seconds, strict=True)
        return ", ".join(name for name, here, one in pairs if here > one * (1 + MARGIN))

    columns = [Column("machines"), *(Column(name, format="s") for name in ("ms a step", "cfg above 1"))]
    rows = [(named(*key), *map(in_milliseconds, both), slower(both)) for key, both in seconds.items()]
    told = [f"{machines} machines of {per_machine} {card} ({link}), predicted, and not tried:"]
    return told + ["  " + line for line in fitted((*columns, Column("slower than one")), rows).splitlines()]
