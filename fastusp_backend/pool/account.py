"""What people want to know of a pool beside its processes: whether somebody samples with it, how far that is, what went
wrong last."""

import contextlib
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import Cancelled, FastUSPError
from ..prompt import Tensors
from ..protocol import Step
from .progress import Progress

_RECENT = 8
"""Steps by which the time of the others is judged: the first ones may compile."""


@dataclass(frozen=True, slots=True)
class Activity:
    """What a request does: a phase before its steps, since a time of `time.monotonic`; or steps, of which so many are
    done, and the seconds that the last ones took each."""

    phase: str
    since: float
    step: int = 0
    steps: int = 0
    seconds: tuple[float, ...] = ()

    def facts(self) -> dict:
        """For `Pool.status`: phase and phase_seconds; step, steps, ms_per_step and seconds_left where there are
        steps."""
        found = {"phase": self.phase, "phase_seconds": round(time.monotonic() - self.since, 1)}
        if not self.steps:
            return found
        each = statistics.median(self.seconds[-_RECENT:])
        left = (self.steps - self.step) * each
        return found | {
            "step": self.step,
            "steps": self.steps,
            "ms_per_step": round(each * 1000, 1),
            "seconds_left": round(left, 1),
        }


class Account:
    """How one pool's requests fare.

    error: the text of what the last one to fail raised, until one succeeds.
    activity: what the current one does, None where none says so.
    last: steps, seconds and ms_per_step of the last run that ended well.
    """

    def __init__(self):
        self.error: str | None = None
        self.activity: Activity | None = None
        self.last: dict | None = None
        self._lock = threading.Lock()
        self._runs = 0

    @property
    def sampling(self) -> bool:
        """Whether a sampling run is under way, though no request of it may run."""
        return self._runs > 0

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """A sampling run, from its beginning to its end or failure, as `request` accounts for it. Runs may lie in each
        other."""
        with self._lock:
            self._runs += 1
        try:
            with self.request():
                yield
        finally:
            with self._lock:
                self._runs -= 1

    def following(self, progress: Progress) -> Progress:
        """Returns a progress that tells this account too."""

        def phase(text: str) -> None:
            self.activity = Activity(text, time.monotonic())
            progress.phase(text)

        def step(event: Step, tensors: Tensors) -> None:
            now = self.activity
            if now is None or not now.steps:
                now = Activity("sampling", time.monotonic() - event.seconds)
            self.activity = replace(now, step=event.index + 1, steps=event.total, seconds=(*now.seconds, event.seconds))
            progress.step(event, tensors)

        return replace(progress, phase=phase, step=step)

    def ended_well(self) -> None:
        """A request has succeeded."""
        self.error, now = None, self.activity
        if now is not None and now.steps:
            each = statistics.median(now.seconds[-_RECENT:])
            seconds = time.monotonic() - now.since
            self.last = {"steps": now.step, "seconds": round(seconds, 1), "ms_per_step": round(each * 1000, 1)}

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """A request, or an order to idle workers. What its client wanted so is no error."""
        try:
            yield
        except Cancelled:
            raise
        except FastUSPError as error:
            self.error = str(error)
            raise
        finally:
            self.activity = None
