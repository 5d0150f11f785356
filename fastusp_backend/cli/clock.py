"""How long the steps of a command's runs take, and how many of them a cache skips."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from ..pool import Progress
from ..protocol import Done
from .bar import Watch

EVERY = 1e9
"""A threshold that every difference is below."""


class Skipping(NamedTuple):
    """What says how long steps take that a cache skips.

    name, option: of a run that skips all that it may, and its values of `Settings`.
    plain: the name of the run without a cache.
    """

    name: str
    option: dict[str, str | float]
    plain: str


def skipping_all(options: dict[str, dict[str, str | float]]) -> dict[str, Skipping]:
    """Returns it for each option with a cache, by the option's name. How many steps its own run skips says nothing of
    other inputs, and may be none."""
    found = {}
    for name, option in options.items():
        if "cache" in option:
            plain = {key: value for key, value in option.items() if not key.startswith("cache")}
            without = next((other for other, values in options.items() if values == plain), "exact")
            most = f"{without}, cache {option['cache']}, all that it may"
            found[name] = Skipping(most, option | {"cache_threshold": EVERY}, without)
    return found


class Clock:
    """A `Watch` that keeps how long the steps of a name's last run took, and how many of them were skipped."""

    def __init__(self, watch: Watch):
        self._watch = watch
        self._seconds: dict[str, list[float]] = {}
        self._skipped: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str, total: int) -> Iterator[Progress]:
        seconds = self._seconds[name] = []

        def step(event, tensors) -> None:
            if event is not None:
                seconds.append(event.seconds)
            watched.step(event, tensors)

        def done(event: Done) -> None:
            self._skipped[name] = event.skipped
            watched.done(event)

        with self._watch(name, total) as watched:
            yield replace(watched, step=step, done=done)

    def step(self, name: str) -> float | None:
        """Returns the mean seconds of a step, those that were skipped included; None where there was none."""
        return statistics.fmean(self._seconds[name]) if self._seconds.get(name) else None

    def skipped(self, name: str) -> int:
        """Returns how many steps of a run that ended were skipped."""
        return self._skipped[name]

    def step_of(self, skipped: int, most: Skipping) -> float | None:
        """Returns the mean seconds of a step where a run as long as `most` skips so many, each of which saves alike;
        None where that skipped none, as with values that are not finite."""
        if not self._skipped[most.name]:
            return None
        plain = self.step(most.plain)
        return plain - (plain - self.step(most.name)) * skipped / self._skipped[most.name]
