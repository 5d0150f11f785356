"""One request with a fault in it, and somebody who looks at the clock meanwhile."""

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from fastusp_backend.errors import Cancelled, CheckpointError, PoolError, ProtocolError, RequestError

from .requests import Caller, Request
from .world import World

How = Literal[
    "result", "cancelled", "refused", "died", "interrupted", "own", "no effect", "replaced", "host died", "other"
]


class Own(BaseException):
    """An exception of the caller's, raised from one of its callbacks."""


class Moment(NamedTuple):
    """idle: before the request. start: so many seconds after it, which starts new processes. load: likewise, and the
    model is not loaded. delay: so many seconds after it. step: after so many steps."""

    kind: str
    amount: float

    def __str__(self) -> str:
        return {
            "idle": "before",
            "start": f"{self.amount:.2f} s into the start of",
            "load": f"{self.amount:.3f} s into the load of",
            "delay": f"{self.amount:.3f} s into",
            "step": f"at step {self.amount} of",
        }[self.kind]


@dataclass
class Ending:
    """How a request ended. seconds: from the fault, or from the request where that came later. struck: whether the
    fault came before the end. hung: whether the clock had to end it. findings: what was wrong on the way."""

    how: How
    seconds: float
    struck: bool = True
    error: BaseException | None = None
    latents: torch.Tensor | None = None
    hung: bool = False
    findings: list[str] = field(default_factory=list)


class Clock:
    """Ends the workers of a request that takes too long, after all threads' stacks were printed."""

    def __init__(self, world: World):
        self._world = world
        self._deadline: float | None = None
        self._late = False
        threading.Thread(target=self._watch, daemon=True).start()

    def set(self, seconds: float) -> None:
        self._deadline, self._late = time.monotonic() + seconds, False

    def stop(self) -> bool:
        """Whether it was late."""
        self._deadline = None
        return self._late

    def _watch(self) -> None:
        while True:
            time.sleep(0.5)
            deadline = self._deadline
            if deadline is None or time.monotonic() < deadline:
                continue
            if self._late:
                print("HANG: not even the end of the workers ends the request", flush=True)
                os._exit(1)
            print("HANG: a request takes too long; all threads:", flush=True)
            faulthandler.dump_traceback(sys.stdout, all_threads=True)
            self._late, self._deadline = True, time.monotonic() + 30
            self._world.end_workers()


class Scene:
    """Plays requests of one world, on the main thread."""

    def __init__(self, world: World):
        self._world = world
        self._clock = Clock(world)
        self._armed = False
        signal.signal(signal.SIGINT, self._interrupted)

    def _interrupted(self, number, frame) -> None:
        if self._armed or not self._world.pressing:  # else it came too late for the request
            raise KeyboardInterrupt

    def play(self, request: Request, seconds: float, fault=None, moment: Moment | None = None) -> Ending:
        """seconds: how long it may take."""
        act = _Act(fault, moment)
        if moment is not None:
            if moment.kind == "start":
                self._world.end_workers()
            elif moment.kind == "load" and self._world.ranks():
                self._world.release()
        self._clock.set(seconds)
        act.begin()
        ending = Ending("other", 0.0)
        began = time.monotonic()
        try:
            self._armed = True
            try:
                ending = Ending("result", 0.0, latents=request.run(self._world, act.caller))
            finally:
                self._armed = False
        except BaseException as error:
            ending = Ending(act.told(error), 0.0, error=error)
            if ending.how == "other":
                traceback.print_exc(file=sys.stdout)
        ended = time.monotonic()
        act.end()
        ending.hung = self._clock.stop()
        ending.struck = act.struck is not None and act.struck <= ended
        ending.seconds = ended - max(began, act.struck or began)
        return ending


class _Act:
    """The fault's part in it."""

    def __init__(self, fault, moment: Moment | None):
        self._fault, self._moment = fault, moment
        self._timer: threading.Timer | None = None
        self._problem: BaseException | None = None
        self.struck: float | None = None
        self.caller = Caller(self._step, self._phase, self._asked)
        self._since: float | None = None  # when it was done
        self._no_effect = False

    def begin(self) -> None:
        if self._moment is None:
            return
        if self._moment.kind == "idle":
            self._strike()
        elif self._moment.kind != "step":
            self._timer = threading.Timer(self._moment.amount, self._strike)
            self._timer.daemon = True
            self._timer.start()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        if self._problem is not None:
            raise self._problem

    def told(self, error: BaseException) -> How:
        if isinstance(error, Cancelled):
            return "no effect" if self._no_effect else "cancelled"
        if isinstance(error, PoolError):
            return "died"
        if isinstance(error, RequestError | CheckpointError | ProtocolError):
            return "refused"
        kinds: dict[type, How] = {KeyboardInterrupt: "interrupted", Own: "own"}
        return kinds.get(type(error), "other")

    def _strike(self) -> None:
        try:
            self.struck = time.monotonic()
            self._fault.strike()
            self._since = time.monotonic()
        except KeyboardInterrupt:
            raise  # what it was to do; this is a step's callback
        except BaseException as error:
            self._problem = error

    def _step(self, number: int) -> None:
        moment = self._moment
        if moment is not None and moment.kind == "step" and self.struck is None and number >= moment.amount:
            self._strike()
        self._call("step")

    def _phase(self, text: str) -> None:
        self._call("phase")

    def _asked(self) -> bool:
        if self._fault is None or self.struck is None:
            return False
        self._call("interrupted")
        if self._since is not None and time.monotonic() - self._since > self._fault.patience:
            self._no_effect = True
        return self._fault.cancels or self._no_effect

    def _call(self, where: str) -> None:
        if self._fault is not None and self.struck is not None and self._fault.raises == where:
            raise Own(where)
