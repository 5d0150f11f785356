"""Workers on several machines: a pool's processes here, with parts of the same run elsewhere."""

from collections.abc import Callable
from concurrent.futures import Future

from ..devices import Devices
from ..errors import PoolError
from ..pool.cause import KILLED
from ..pool.hangs import Hang, Suspicion
from ..pool.log import WorkerLog
from ..pool.workers import Workers
from .machines import SURE, Machines, Report

OWN_SECONDS = 4.0
"""How long ranks may take to end by themselves when others that merely lost them did: they may be the cause, and tell
it. Their torchrun sees it a moment later, more on a machine that is at its limits."""

REPORT_SECONDS = 5.0
"""How long a machine may take to say why its part has ended, once it was told to end it."""


class JoinedWorkers(Workers):
    """devices: this machine's."""

    def __init__(self, devices: Devices, changed: Callable[[], None], machines: Machines):
        """Raises PoolError where machines are missing, and as `Workers`."""
        self._machines = machines
        self._reports: list[Report] | None = None
        self._told: str | None = "start"
        self._begun: Future[bool] = Future()
        place = machines.begin(self._broke)
        self._run = place.run
        try:
            super().__init__(devices, lambda: self._tell(changed), place)
        except BaseException:  # what has begun elsewhere would wait for these
            machines.end(place.run)
            self._begun.set_result(False)
            raise
        self.beginning = f"starting {devices.ranks} worker(s) on each of {machines.count} machines"
        self._begun.set_result(True)

    def _tell(self, changed: Callable[[], None]) -> None:
        if not self.alive:
            self._end_elsewhere()
        changed()

    def _end_elsewhere(self) -> None:
        """Has the other machines end their parts, the one here having ended."""
        if self.processes.ranked_cause(self.model)[0] > SURE:
            self._machines.reports(self._run, OWN_SECONDS)
        self._machines.end(self._run)

    def _broke(self, why: str | None, sure: bool) -> None:
        """A part elsewhere has ended."""
        if not self._begun.result():
            return
        if not sure:
            self.processes.wait_until_ended(OWN_SECONDS)
        if self.alive:
            self._end(why)

    def _suspect(self) -> Suspicion | None:
        awaited = self._awaited
        if awaited != self._told:
            self._told = awaited
            self._machines.wait_for(self._run, awaited)
        suspicion = super()._suspect()
        if suspicion is None or suspicion.ranks or awaited == "start" or self._machines.quiet:
            return suspicion
        return None  # another machine's ranks get on, and these wait for them

    def _accuse(self, suspicion: Suspicion) -> Hang:
        hang = super()._accuse(suspicion)
        if not hang.waiting:
            return hang
        return hang._replace(cause=f"a rank of {self._machines} {suspicion.what}, and all ranks here waited for it")

    def kill(self) -> None:
        self._machines.end(self._run)
        super().kill()

    def memory(self) -> list[dict | None]:
        return super().memory() + self._machines.memory()

    def write_log(self, log: WorkerLog) -> None:
        super().write_log(log)
        log.add(self._machines.lines())

    def _cause(self) -> str:
        if self._why:
            return self._why
        if self._reports is None:
            self._end_elsewhere()
            self._reports = self._machines.reports(self._run, REPORT_SECONDS)
        order, text = self.processes.ranked_cause(self.model)
        first = min([Report(order, text, []), *self._reports], key=lambda report: report.order)
        return first.text

    def failure(self, event: str) -> PoolError:
        error = super().failure(event)
        lines = [line for report in self._reports or () if report.order < KILLED for line in report.lines]
        return PoolError("\n".join([str(error), *(f"  {line}" for line in lines)]))
