"""`plan`'s table of what a step takes on 1, 2, 4 and 8 GPUs, and where more of them are slower."""

from ..config import Layout, LinearChoice, WireChoice
from ..errors import RequestError
from ..models.prediction import Card, Link, Prediction, fewer_are_faster, in_milliseconds, pcie_of
from ..planner import plan_batches
from .file import File
from .table import Column, fitted

COUNTS = 1, 2, 4, 8
PROMPTS = {1: "cfg 1", 2: "cfg above 1"}


def scaling(
    file: File,
    layouts: tuple[Layout, ...],
    free: int,
    card: Card,
    linear: LinearChoice,
    wire: WireChoice,
    measured: tuple[Link, ...] = (),
) -> list[str]:
    """Says what a step is predicted to take on so many GPUs as are meant, and on `COUNTS`.

    layouts: of those that are meant, as `plan_batches` gives them.
    free: bytes of each GPU that a worker has.
    measured: links beside those that are usual.
    """
    meant = layouts[-1].ranks
    counts = sorted({*COUNTS, meant})
    links = (*measured, *filter(None, [card.nvlink]), *pcie_of(card))
    of_count = {count: plan_batches(count, file.config.heads) for count in COUNTS} | {meant: layouts}
    made = {count: Prediction(file.header, file.config, some, card, linear, wire) for count, some in of_count.items()}
    seconds: dict[tuple[Link, int], dict[int, float]] = {(link, prompts): {} for link in links for prompts in PROMPTS}
    for count in counts:
        for peers in {link.apart for link in links}:
            try:
                found, _ = file.settle(count, linear, free, peers=peers and count > 1)
            except RequestError:  # too little room on so many
                continue
            for link, prompts in seconds:
                if link.apart == peers:
                    seconds[link, prompts][count] = made[count].seconds(found, link, prompts=prompts)

    def cell(count: int, link: Link) -> str:
        both = [seconds[link, prompts].get(count) for prompts in PROMPTS]
        return "no room" if None in both else " / ".join(map(in_milliseconds, both))

    columns = Column("GPUs", format="d"), *(Column(str(link)) for link in links)
    rows = [(count, *(cell(count, link) for link in links)) for count in counts]
    told = ["ms a step, cfg 1 / above 1 (PCIe: without peer access)"]
    told += ["  " + line for line in fitted(columns, rows).splitlines()]
    slower: dict[tuple[int, int, int], list[str]] = {}
    for (link, prompts), of_link in seconds.items():
        for count in of_link:
            if fewer := fewer_are_faster([of_link], count):
                slower.setdefault((count, fewer, prompts), []).append(str(link))
    for (count, fewer, prompts), names in slower.items():
        told.append(
            f"{count} GPUs are predicted to be slower than {fewer} on {' and '.join(names)}, {PROMPTS[prompts]}"
        )
    return told
