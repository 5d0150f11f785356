"""What people want to know of a pool beside its processes: whether somebody samples with it, how far that is, how the
last runs went, what went wrong last."""

import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import Cancelled, FastUSPError
from ..prompt import Tensors
from ..protocol import Done, Step
from .progress import Progress

_RECENT = 8
"""Steps by which the time of the others is judged: the first ones may compile."""
RUNS = 5
"""How many runs are remembered."""


@dataclass(frozen=True, slots=True)
class Activity:
    """What a request does: a phase before its steps, since a time of `time.monotonic`; or steps, of which so many are
    done, and the seconds that each took of which that is known. cached: steps may be skipped, so that what one takes
    says nothing of another."""

    phase: str
    since: float
    step: int = 0
    steps: int = 0
    seconds: tuple[float, ...] = ()
    cached: bool = False

    @property
    def seconds_per_step(self) -> float | None:
        """None where it is not known, or steps may be skipped."""
        return statistics.median(self.seconds[-_RECENT:]) if self.seconds and not self.cached else None

    @property
    def seconds_left(self) -> float | None:
        """Where steps may be skipped, by the mean of all but the first one."""
        each = self.seconds_per_step
        if self.cached and len(self.seconds) > 1:
            each = statistics.mean(self.seconds[1:])
        return None if each is None else (self.steps - self.step) * each

    def facts(self) -> dict:
        """For `Pool.status`: phase and phase_seconds; where there are steps, step and steps; where they are known,
        ms_per_step and seconds_left."""
        found = {"phase": self.phase, "phase_seconds": round(time.monotonic() - self.since, 1)}
        if self.steps:
            found |= {"step": self.step, "steps": self.steps}
        if (each := self.seconds_per_step) is not None:
            found["ms_per_step"] = round(each * 1000, 1)
        if (left := self.seconds_left) is not None:
            found["seconds_left"] = round(left, 1)
        return found


class Account:
    """How one pool's requests fare.

    error: the text of what the last one to fail raised, until one succeeds.
    activity: what the current one does, None where none says so.
    history: the last runs that ended well, the newest first: what `run` was told about each; ended, in seconds since
        the epoch; seconds; steps; ms_per_step, None where it is not known or steps may have been skipped; evaluations
        and skipped, of the workers' loops with a cache; phases, the seconds of each part, in order.
    """

    def __init__(self):
        self.error: str | None = None
        self.activity: Activity | None = None
        self.history: deque[dict] = deque(maxlen=RUNS)
        self._phases: dict[str, float] = {}
        self._lock = threading.Lock()
        self._runs = 0
        self._evaluations = self._skipped = 0

    @property
    def sampling(self) -> bool:
        """Whether a sampling run is under way, though no request of it may run."""
        return self._runs > 0

    @contextlib.contextmanager
    def run(self, about: dict) -> Iterator[None]:
        """A sampling run, from its beginning to its end or failure, as `request` accounts for it. Runs may lie in each
        other. about: what `history` is to tell of it."""
        began = time.monotonic()
        with self._lock:
            if not self._runs:
                self._phases = {}
                self._evaluations = self._skipped = 0
            self._runs += 1
        try:
            with self.request():
                yield
            if (now := self.activity) is not None and now.steps:
                self._turn(None)
                self._remember(about, now, time.monotonic() - began)
        finally:
            with self._lock:
                self._runs -= 1
            self._turn(None)

    def _remember(self, about: dict, now: Activity, seconds: float) -> None:
        each = now.seconds_per_step
        self.history.appendleft(
            about
            | {
                "ended": round(time.time()),
                "seconds": round(seconds, 1),
                "steps": now.step,
                "ms_per_step": each and round(each * 1000, 1),
                "evaluations": self._evaluations,
                "skipped": self._skipped,
                "phases": {phase: round(took, 1) for phase, took in self._phases.items()},
            }
        )

    def following(self, progress: Progress, *, cached: bool = False) -> Progress:
        """Returns a progress that tells this account too. cached: as of an `Activity`."""

        def phase(text: str) -> None:
            self._turn(Activity(text, time.monotonic()))
            progress.phase(text)

        def step(event: Step, tensors: Tensors) -> None:
            self.stepped(event.index, event.total, event.seconds, cached=cached)
            progress.step(event, tensors)

        def done(event: Done) -> None:
            self._evaluations += event.evaluations
            self._skipped += event.skipped
            progress.done(event)

        return replace(progress, phase=phase, step=step, done=done)

    def stepped(self, index: int, total: int, seconds: float | None, *, cached: bool = False) -> None:
        """Step `index` of `total` is done. seconds: what it took, None where that is not known. cached: as of an
        `Activity`."""
        now = self.activity
        if now is None or not now.steps:
            now = Activity("sampling", time.monotonic() - (seconds or 0))
            self._turn(now)
        known = () if seconds is None else (seconds,)
        self.activity = replace(
            now,
            step=index + 1,
            steps=max(total, index + 1),
            seconds=now.seconds + known,
            cached=now.cached or cached,
        )

    def ended_well(self) -> None:
        """A request has succeeded."""
        self.error = None

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
            if not self.sampling:
                self._turn(None)

    def _turn(self, activity: Activity | None) -> None:
        """What is done from now on."""
        if (past := self.activity) is not None:
            until = activity.since if activity is not None else time.monotonic()
            self._phases[past.phase] = self._phases.get(past.phase, 0.0) + max(0.0, until - past.since)
        self.activity = activity
