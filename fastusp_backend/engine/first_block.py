"""Evaluations of which only the first block is computed (as FBCache, "first block cache", of ParaAttention).

What a block adds to the image's tokens says how much the others will add: while the first one's part is nearly what it
was when all were computed last, the others' is taken from then, and on along the line through what it was then and the
time before (as TaylorSeer, arXiv 2503.06923, in its first order), but no farther than these two are apart: beyond that
the line leads away. How near is one number: the sum of the differences over the sum of the values, over all tokens of
the image, on whichever ranks they lie. Those of references do not count: they hardly change from step to step, and the
more of them there are the less would the image's change weigh.

So all ranks of a sequence decide alike, and batch groups each for their own prompt: nothing is exchanged between these
within an evaluation, and what is decided of a prompt does not depend on where it is evaluated. Where the groups divide
the images of one prompt, the sums are over all of them. The sums are added on the CPU, in the order of ranks.

Shapes: B batch, Li image tokens of this rank, C hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..comm.mesh import Mesh
from ..config import CacheRule
from ..models.family import Stage
from ..prompt import Prompt

KEPT = 6
"""Tensors of the size of the image's tokens, (B, Li, C), that a prompt takes: what is kept, twice while it is replaced,
or what is kept and what is compared."""

Gather = Callable[[list[float]], list[list[float]]]
"""numbers -> those of every rank of the pool, in their order, on all of them."""


class Kept(NamedTuple):
    """Of the last evaluation with all blocks.

    first, others: what the first block added to the image's tokens, and what the others did, (B, Li, C).
    timestep: whose it is.
    change: what of `others` had changed since the one with all blocks before it, (B, Li, C); None where there is none.
    over: the difference of their timesteps.
    """

    first: torch.Tensor
    others: torch.Tensor
    timestep: float
    change: torch.Tensor | None = None
    over: float = 0.0

    def at(self, timestep: float) -> torch.Tensor:
        """What the others add there, nearly."""
        if self.change is None:
            return self.others
        share = (timestep - self.timestep) / self.over
        return torch.add(self.others, self.change, alpha=min(max(share, 0.0), 1.0))


class FirstBlockCache:
    """For one sampling run. All ranks call the same methods in the same order.

    timestep_scale: the model's timestep per sigma.
    gather: see `Gather`.
    evaluations, skipped: of all prompts, in all batch groups: how many were asked for, and of how many the first block
        alone was computed.
    """

    def __init__(self, rule: CacheRule, timestep_scale: float, mesh: Mesh, gather: Gather):
        self._threshold, self._mesh, self._gather = rule.threshold, mesh, gather
        # Rounded as the timesteps are that they are compared with.
        self.start, self.end = (torch.tensor([rule.start, rule.end]) * timestep_scale).tolist()
        self.kept: dict[Prompt, Kept] = {}
        self.evaluations = self.skipped = 0

    def of(self, prompt: Prompt, timestep: torch.Tensor, *, prompts: int) -> "PromptCache":
        """What the evaluation of one of a step's prompts at `timestep`, (B,) on the CPU, needs."""
        return PromptCache(self, prompt, float(timestep[0]), self._mesh.layout.batch if prompts > 1 else 1)

    def near_enough(self, sums: list[float], groups: int) -> bool:
        """Whether this rank's group skips. sums: of this rank's differences and values. groups: how many decide by
        themselves. Collective over all ranks."""
        ranks = self._gather(sums)
        each = len(ranks) // groups
        totals = [[sum(column) for column in zip(*ranks[n * each :][:each], strict=True)] for n in range(groups)]
        skips = [change < self._threshold * size for change, size in totals]
        self.skipped += sum(skips)
        return skips[self._mesh.batch_position if groups > 1 else 0]


@dataclass(frozen=True, slots=True)
class PromptCache:
    """One evaluation of a prompt. groups: those that evaluate other prompts at the same time, with this one's."""

    cache: FirstBlockCache
    prompt: Prompt
    timestep: float
    groups: int

    def skip_to(self, head: Stage, tokens: int) -> torch.Tensor | None:
        """head: after the first block. tokens: how many of the rank's image tokens are the image's own, which come
        first; it may have none. Gives the image's tokens (B, Li, C) as the last block would, nearly; None where the
        others are to be computed."""
        self.cache.evaluations += self.groups
        kept = self.cache.kept.get(self.prompt)
        if kept is None or not self.cache.end < self.timestep <= self.cache.start:
            return None
        before = kept.first[:, :tokens]
        change = (head.after - head.before)[:, :tokens] - before
        sums = torch.stack([values.abs().sum(dtype=torch.float32) for values in (change, before)])
        return head.after + kept.at(self.timestep) if self.cache.near_enough(sums.tolist(), self.groups) else None

    def keep(self, head: Stage, end: Stage) -> None:
        """For those that follow; end: after the last block."""
        if self.timestep <= self.cache.end:
            return
        first, others, change, over = head.after - head.before, end.after - head.after, None, 0.0
        if (kept := self.cache.kept.get(self.prompt)) is not None:
            over = self.timestep - kept.timestep
            if over:
                change = others - kept.others
            else:  # of two at one timestep, as some samplers have them, the second says more of none between
                change, over = kept.change, kept.over
        self.cache.kept[self.prompt] = Kept(first, others, self.timestep, change, over)
