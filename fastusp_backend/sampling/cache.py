"""Evaluations of a sampling run that are skipped: EasyCache's rule (arXiv 2507.02860), in the order in which ComfyUI's
nodes apply it.

Between two evaluations a model's output mostly changes as much as its input did, in a ratio that hardly moves. So of
the two evaluations before, the rule knows the ratio, and of the input that comes it estimates how much the output has
changed since it was last computed, relative to its mean. While the sum of these estimates stays below a threshold, the
output is not computed: it is the input, plus what lay between output and input the last time.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..config import CacheRule

SUBSAMPLED = 8
"""Of the latents' rows and columns, every so many count for how much they change."""


class _Known(NamedTuple):
    """Of the last evaluation by which changes are measured: its x and output, subsampled, and the output's mean size,
    ()."""

    x: torch.Tensor
    output: torch.Tensor
    size: torch.Tensor


class Cache:
    """outputs = cache(x, sigma, evaluate): evaluate(), or what is made of the last evaluation.

    agree: gives all ranks the answer of one, so that none evaluates alone: sums may round differently on another GPU.
    together: the outputs are of one shape and evaluated in one go, as ComfyUI evaluates prompts of one length. Then the
        last of them is what changes are measured by, relative to the mean of all; else it is the first alone.
    evaluations, skipped: how many were asked for, and how many of them not computed.
    """

    def __init__(self, rule: CacheRule, agree: Callable[[bool], bool], *, together: bool = False):
        self._rule, self._agree, self._together = rule, agree, together
        self.evaluations = self.skipped = 0
        self._offsets: list[torch.Tensor] = []
        self._known: _Known | None = None
        self._rate: torch.Tensor | None = None
        self._estimated: torch.Tensor | float = 0.0

    @property
    def skips_guided(self) -> bool:
        """Whether the output is the denoised image that guidance gives, not the model's velocities."""
        return self._rule.kind == "lazy"

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, evaluate: Callable[[], Sequence[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """x (B, C, h, w) float32, sigma () -> outputs, each as x, float32 where they come from the cache."""
        self.evaluations += 1
        level = float(sigma)
        counts = self._rule.end < level <= self._rule.start
        change = self._changed(x, self._known.x) if counts and self._known is not None else None
        if change is not None and self._rate is not None and self._may_skip(change):
            self.skipped += 1
            return [self._answer(x, offset, level) for offset in self._offsets]
        outputs = [output.float() for output in evaluate()]
        if level > self._rule.end:
            self._offsets = [output - x for output in outputs]
        if counts or self.skips_guided:
            self._measure(x, outputs, change)
        return outputs

    def _may_skip(self, change: torch.Tensor) -> bool:
        self._estimated = self._estimated + self._rate * change / self._known.size
        if self._agree(bool(self._estimated < self._rule.threshold)):
            return True
        self._estimated = 0.0
        return False

    def _measure(self, x: torch.Tensor, outputs: list[torch.Tensor], change: torch.Tensor | None) -> None:
        lead = outputs[-1 if self._together else 0]
        if change is not None:
            self._rate = self._changed(lead, self._known.output) / change
        whole = torch.cat(outputs) if self._together else lead
        self._known = _Known(_subsampled(x).clone(), _subsampled(lead).clone(), whole.abs().mean())

    def _answer(self, x: torch.Tensor, offset: torch.Tensor, sigma: float) -> torch.Tensor:
        moved = x + offset
        if self._rule.kind == "easy_in_place":  # so that x - velocity sigma is what it gives with `moved` for x as well
            moved = moved - offset / sigma
        return moved

    @staticmethod
    def _changed(values: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return (_subsampled(values) - before).abs().mean()


def _subsampled(values: torch.Tensor) -> torch.Tensor:
    return values[..., ::SUBSAMPLED, ::SUBSAMPLED]
