"""Processes that end, stand still or loop."""

import signal
import threading

from fastusp_backend.pool import hangs

from ..requests import ENDLESS, FINITE
from ..world import FAIL, LEAVE, LOOP
from .base import ANY, STANDING, Endless, Fault, OnRanks, name_of_signal, send


class Kill(OnRanks, Endless):
    """A rank, seldom all, is ended by a signal: KILL, TERM, SEGV, ABRT, BUS, HUP, INT."""

    requests = ENDLESS + FINITE
    allowed = frozenset({"died"})

    def draw(self) -> None:
        super().draw()
        signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT)
        self.signal = self.rng.choice((*signals, signal.SIGBUS, signal.SIGHUP, signal.SIGINT))

    def strike(self) -> None:
        victims = self.victims()
        name = name_of_signal(self.signal)
        who = self.told(victims) if victims else r"torchrun \(process \d+\)"
        self.names = f"{who} was ended by {name}"
        if self.signal == signal.SIGINT:
            ranks = "|".join(map(str, victims))
            self.names += rf"|rank ({ranks}) failed with KeyboardInterrupt"
        self.detail = f"{name} to rank {[*victims]}" if victims else f"{name} to torchrun"
        for pid in victims.values() or [self.world.torchrun]:
            if pid is not None:
                send(pid, self.signal)


class KillTorchrun(Endless):
    """torchrun is ended by a signal: KILL, TERM, INT, HUP, ABRT."""

    allowed = frozenset({"died"})

    def draw(self) -> None:
        self.signal = self.rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGABRT))

    def strike(self) -> None:
        name, pid = name_of_signal(self.signal), self.world.torchrun
        self.detail = f"{name} to torchrun"
        self.names = rf"torchrun \(process {pid}\) was ended by {name}"
        if pid is not None:
            send(pid, self.signal)


class Blind(OnRanks, Endless):
    """A rank is killed while torchrun, which would notice, is stopped."""

    moments = STANDING
    allowed = frozenset({"died"})
    limit = 20.0
    names = r"rank \d|did not end by themselves"

    def strike(self) -> None:
        victims, torchrun = self.victims(), self.world.torchrun
        self.detail = f"SIGSTOP to torchrun, SIGKILL to rank {[*victims]}"
        if torchrun is not None:
            send(torchrun, signal.SIGSTOP)
        for pid in victims.values():
            send(pid, signal.SIGKILL)


class Leave(OnRanks, Endless):
    """A rank leaves with an exit code, or by an exception, in the middle of what it is at."""

    moments = STANDING
    allowed = frozenset({"died"})

    def draw(self) -> None:
        super().draw()
        self.how = self.rng.choice((LEAVE, FAIL))

    def strike(self) -> None:
        victims = self.victims()
        codes = "7" if self.how == LEAVE else "3"
        self.detail = f"exit({codes}) in rank {[*victims]}"
        self.names = f"{self.told(victims)} ended with exit code {codes}"
        if self.how == FAIL:
            self.names = "|".join(f"rank {rank} failed with SystemExit: 3" for rank in victims)
        for pid in victims.values():
            send(pid, self.how)


class Stop(OnRanks, Endless):
    """A rank, seldom all, is stopped (SIGSTOP) for ever."""

    allowed = frozenset({"died"})
    limit = 15.0

    def strike(self) -> None:
        victims = self.victims()
        self.detail = f"SIGSTOP to rank {[*victims]}"
        self.names = f"{self.told(victims)}.* was stopped"
        shown = all((self.world.run_dir / f"pulse-{rank}").exists() for rank in victims)
        if self.moment.kind == "start" and not (victims and shown):
            self.limit = hangs.START_SECONDS + 15.0
            self.names += "|was not ready"
        for pid in victims.values() or [self.world.torchrun]:
            if pid is not None:
                send(pid, signal.SIGSTOP)


class StopThenCancel(Stop):
    """A rank is stopped for ever; then the prompt is cancelled, and another one comes."""

    moments = STANDING
    allowed = frozenset({"cancelled"})
    limit = 10.0

    def draw(self) -> None:
        super().draw()
        self.later = self.rng.uniform(0.0, 3.0)

    def strike(self) -> None:
        super().strike()
        self.detail += f", Stop {self.later:.1f} s later"
        self.run_beside(threading.Timer(self.later, self._cancel))

    def _cancel(self) -> None:
        self.cancels = True


class Pause(OnRanks):
    """A rank, seldom all, is stopped for less than what counts as a hang, and goes on."""

    moments = ANY
    limit = 20.0
    keeps = True

    def draw(self) -> None:
        super().draw()
        self.seconds = self.rng.uniform(0.2, 7.0)

    def strike(self) -> None:
        self._victims = self.victims()
        self.detail = f"SIGSTOP to rank {[*self._victims]} for {self.seconds:.1f} s"
        for pid in self._victims.values():
            send(pid, signal.SIGSTOP)
        self.run_beside(threading.Timer(self.seconds, self._go_on))

    def _go_on(self) -> None:
        for pid in self._victims.values():
            send(pid, signal.SIGCONT)


class Loop(OnRanks, Fault):
    """A rank loops in Python: in one of its later steps, whose pace is known, or while it waits for a request."""

    moments = ("step", "step", "idle")
    requests = ("endless",)  # what is prepared between evaluations has ten minutes
    allowed = frozenset({"died"})

    def draw(self) -> None:
        super().draw()
        self.all = False
        if self.moment.kind == "step":
            self.moment = self.moment._replace(amount=self.rng.randrange(10, 40))
        self.limit = 15.0 if self.moment.kind == "step" else 35.0

    def strike(self) -> None:
        victims = self.victims()
        self.detail = f"rank {[*victims]} loops"
        self.names = rf"{self.told(victims)} made no progress for \d+ s"
        for pid in victims.values():
            send(pid, LOOP)


class Close(Fault):
    """The pool is closed by another thread."""

    requests = ENDLESS + FINITE
    allowed = frozenset({"died"})
    limit = 15.0
    names = "was closed|stopped|did not start"

    def strike(self) -> None:
        self.detail = "Pool.close()"
        self.run_beside(threading.Thread(target=self.world.pool.close))

    def lift(self) -> None:
        super().lift()
        self.world.new_pool()
