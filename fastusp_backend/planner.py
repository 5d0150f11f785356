"""Chooses the layout batch x ring x ulysses for a number of ranks and a model's heads.

Where a step needs several evaluations (cond and uncond, or the images of a batch) groups of ranks take them apart
first: that needs no communication per layer. Inside a group Ulysses comes first: it sends less than a ring inside a
node (1.61 against 1.6 GB at 2 ranks, 0.71 against 2.8 GB at 8, per FLUX step) and splits the attention's heads, so
its degree must divide the head count. The ring takes the rest. Between machines it always does, where batch groups do
not: a ring sends to one neighbour, while it computes, what Ulysses' exchange would wait for.
"""

from typing import get_args

from .config import BatchParallel, Layout
from .errors import LayoutError


def legal_layouts(ranks: int, heads: int, per_machine: int = 0) -> list[Layout]:
    """All layouts of `ranks` ranks for a model of `heads` attention heads, the preferred one first. per_machine: how
    many of the ranks share a machine; 0 for all."""
    degrees = [u for u in range(ranks, 0, -1) if ranks % u == 0 and heads % u == 0]
    degrees.sort(key=lambda u: (per_machine or ranks) % u != 0)  # those whose exchanges stay inside a machine
    return [Layout(ulysses=u, ring=ranks // u) for u in degrees]


def plan(ranks: int, heads: int, *, ulysses: int = 0, ring: int = 0, per_machine: int = 0) -> Layout:
    """The layout to use; 0 leaves a degree to the planner. per_machine: as in `legal_layouts`.

    Raises LayoutError, listing the legal layouts, when the wish cannot be honoured.
    """
    if min(ulysses, ring) < 0:
        raise LayoutError(
            f"Set degrees of at least 1, or 0, which lets FastUSP choose: not ulysses = {ulysses} and ring = {ring}"
        )
    legal = legal_layouts(ranks, heads, per_machine)
    fitting = [x for x in legal if ulysses in (0, x.ulysses) and ring in (0, x.ring)]
    if fitting:
        return fitting[0]

    wish = " and ".join(f"{name} = {value}" for name, value in (("ulysses", ulysses), ("ring", ring)) if value)
    if ulysses and ring and ulysses * ring != ranks:
        reason = f"ulysses x ring = {ulysses * ring} is not the number of ranks, {ranks}"
    elif ulysses and ranks % ulysses or ring and ranks % ring:
        reason = f"the degree does not divide the number of ranks, {ranks}"
    else:
        degree = ulysses or ranks // ring
        reason = f"a Ulysses degree of {degree} does not divide the model's {heads} attention heads"
    options = ", ".join(str(x) for x in legal)
    raise LayoutError(f"Set 0, or a legal layout ({options}): {wish} cannot be used on {ranks} ranks, since {reason}")


def plan_batches(
    ranks: int,
    heads: int,
    *,
    ulysses: int = 0,
    ring: int = 0,
    batch_parallel: BatchParallel = "auto",
    per_machine: int = 0,
) -> tuple[Layout, ...]:
    """The layouts for any number of evaluations a step, most batch groups first, a single one last.

    A step uses the first whose batch groups divide its evaluations. `auto`: degrees that are set hold in every
    layout, so setting both leaves one. `on`: they are those of the groups. per_machine: as in `legal_layouts`. Raises
    LayoutError when the wish cannot be honoured.
    """
    if batch_parallel not in get_args(BatchParallel):
        raise LayoutError(f"Set batch_parallel to one of {', '.join(get_args(BatchParallel))}, not {batch_parallel!r}")
    if batch_parallel == "off":
        return (plan(ranks, heads, ulysses=ulysses, ring=ring, per_machine=per_machine),)
    if batch_parallel == "on":
        if ranks % 2:
            raise LayoutError(f"Set batch_parallel to auto or off: on needs an even number of ranks, not {ranks}")
        whole = plan(ranks, heads, per_machine=per_machine)
    else:
        whole = plan(ranks, heads, ulysses=ulysses, ring=ring, per_machine=per_machine)
    layouts = []
    for batch in (b for b in range(ranks, 1, -1) if ranks % b == 0):
        try:
            group = plan(ranks // batch, heads, ulysses=ulysses, ring=ring, per_machine=per_machine)
        except LayoutError as error:
            if batch_parallel == "on" and batch == 2:
                raise LayoutError(f"{error} (of each of the two groups that batch_parallel = on asks for)") from None
            continue  # the degrees that are set want larger groups
        layouts.append(Layout(ulysses=group.ulysses, ring=group.ring, batch=batch))
    return (*layouts, whole)
