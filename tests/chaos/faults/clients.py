"""What the client does itself, or what happens to it."""

import os
import signal
import subprocess
import sys
import threading
import time

from pools import processes_of

from ..requests import ENDLESS, FINITE
from ..scene import Ending
from .base import Fault

ORPHAN_SECONDS = 5.0


class Cancel(Fault):
    """Stop, or an exception of the caller's own from one of its callbacks."""

    requests = FINITE + ENDLESS
    limit = 7.0

    def draw(self) -> None:
        self.how = self.rng.choice(("Stop", "Stop", "step", "interrupted"))
        self.allowed = frozenset({"cancelled" if self.how == "Stop" else "own"})

    def strike(self) -> None:
        if self.how == "Stop":
            self.detail, self.cancels = "Stop", True
        else:
            self.detail, self.raises = f"an exception from the callback `{self.how}`", self.how


class Interrupt(Fault):
    """Ctrl-C in the client, once or, impatiently, several times."""

    moments = ("start", "load", "delay", "step")
    requests = FINITE + ENDLESS
    allowed = frozenset({"interrupted"})
    limit = 7.0

    def draw(self) -> None:
        self.times = self.rng.choice((1, 1, 2, 3))
        self.gap = self.rng.uniform(0.001, 0.5)

    def strike(self) -> None:
        self.detail = f"{self.times} x SIGINT"
        self.world.pressing = True
        self.run_beside(threading.Thread(target=self._press))

    def _press(self) -> None:
        for n in range(self.times):
            if n:
                time.sleep(self.gap)
            os.kill(os.getpid(), signal.SIGINT)

    def lift(self) -> None:
        super().lift()
        time.sleep(0.1)  # all have arrived
        self.world.pressing = False


class HostDeath(Fault):
    """A process that owns a pool is killed: its workers go with it, the next start removes what it left."""

    requests = ENDLESS
    moments = ("start", "step")
    allowed = frozenset({"host died"})

    def draw(self) -> None:
        signals = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGABRT, signal.SIGHUP)
        self.signal = self.rng.choice(signals)

    def play(self) -> Ending:
        """The host is a program of its own; see host.py."""
        self.detail = f"{signal.Signals(self.signal).name} to a host"
        command = [sys.executable, "-m", "tests.chaos.host", str(self.world.devices).removeprefix("gpu ")]
        command += [str(self.world.files[self.request.model])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as host:
            directory = host.stdout.readline().strip()
            if self.moment.kind == "start":
                time.sleep(self.moment.amount)
            else:
                while (line := host.stdout.readline()) and int(line) < self.moment.amount:
                    pass
            began = time.monotonic()
            host.send_signal(self.signal)
            host.wait()
        while (left := processes_of(directory)) and time.monotonic() < began + ORPHAN_SECONDS:
            time.sleep(0.02)
        ending = Ending("host died", time.monotonic() - began)
        if left:
            ending.findings.append(f"ORPHAN: processes {left} outlive their host")
        self.world.end_workers()  # so that the next prompt starts new ones, and sweeps
        return ending
