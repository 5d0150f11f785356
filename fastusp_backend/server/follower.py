"""A machine that is not the first: it starts its part of each run, watches over it, and tells the first one."""

import logging
import threading
import time
from concurrent.futures import wait
from functools import partial

from ..devices import Devices, supports_bfloat16
from ..door import enter
from ..errors import DeviceError, PoolError, ProtocolError
from ..pool.cause import KILLED, UNTOLD, last_log_lines
from ..pool.hangs import LOOK_SECONDS, HangDetector, Suspicion
from ..pool.link import Link
from ..pool.log import WorkerLog
from ..pool.processes import Place, Processes
from ..pool.rundir import RunDir
from ..protocol import Channel, Failed
from ..protocol.machines import Awaits, Broke, Join, Leave, Run, Seen, Stop, ToMachine
from .interfaces import interface_of
from .meanwhile import meanwhile
from .software import Software

log = logging.getLogger(__name__)

AGAIN_SECONDS = 1.0
"""Between two tries to reach the first machine."""
SHOWN_SECONDS = 1.0
LAST_SECONDS = 2.0
"""How long the last word may take to leave."""


class _Part:
    """This machine's processes of one run."""

    def __init__(self, devices: Devices, place: Place, first: int):
        self.run = place.run
        self._run_dir = RunDir()
        self.hangs = HangDetector(self._run_dir.path, devices.ranks, first)
        self.log, self._line = WorkerLog(), 0
        self._why = ""
        self._stopped = False
        self.quiet = False
        """Whether all ranks are still, which may be another machine's doing."""
        self.processes = Processes(devices, self._run_dir.path, place)

    def look(self, awaited: str | None) -> Suspicion | None:
        """Whom the part is to be ended for: ranks that were stopped."""
        suspicion = self.hangs.look(awaited)
        self.quiet = suspicion is not None
        return suspicion if self.quiet and suspicion.ranks and self.processes.alive else None

    def condemn(self, suspicion: Suspicion) -> None:
        """Ends it for what `look` has found."""
        self._why = self.hangs.accuse(suspicion).cause
        self.kill()

    def memory(self) -> list[tuple | None]:
        return [pulse.memory() for pulse in self.hangs.pulses]

    def lines(self) -> list[str]:
        self.log.take(self._run_dir.path)
        lines, self._line = self.log.since(self._line)
        return lines

    def stop(self) -> None:
        """Ends it, which is not why the run has ended."""
        self._stopped = self._stopped or self.processes.alive
        self.kill()

    def kill(self) -> None:
        pids = [sign.pid for pulse in self.hangs.pulses if (sign := pulse.read()) is not None]
        self.processes.kill(pids)

    def report(self) -> Broke:
        """Why it has ended."""
        if self._why:
            return Broke(run=self.run, order=0, text=self._why, lines=[])
        order, text = self.processes.ranked_cause(None)
        lines = [] if self._stopped else last_log_lines(self._run_dir.path)
        if self._stopped:  # to have been ended explains nothing, not even beside ranks that merely lost others
            order = UNTOLD if order == KILLED else max(order, KILLED + 1)
        return Broke(run=self.run, order=order, text=text, lines=lines)

    def close(self) -> None:
        self.kill()
        self.hangs.close()
        self._run_dir.remove()


class Follower:
    """machine: this one's number, from 1 on. address: the first one's, key: the path of the key file."""

    def __init__(self, devices: Devices, machine: int, address: str, key: str):
        self._devices, self._machine = devices, machine
        self._address, self._key = address, key
        self._software = Software()
        self._stopped = threading.Event()
        self._awaited: str | None = None

    def stop(self) -> None:
        """Has `serve` return. May be called by a signal's handler."""
        self._stopped.set()

    def serve(self) -> None:
        """Follows the first machine, which may come later, and come again, until `stop`, or until it was told to end.
        Raises KeyFileError, ProtocolError or RequestError where it may not."""
        told = False
        while not self._stopped.is_set():
            try:
                channel, _, own = enter(self._address, self._key, ToMachine)
            except DeviceError as error:
                if not told:
                    log.info("waiting for the first machine: %s", error)
                told = True
                self._stopped.wait(AGAIN_SECONDS)
                continue
            told = False
            link = Link(channel, lambda message: None)
            try:
                link.send(channel.frame(self._join()), lambda: None)
                log.info("joined %s as machine %d", self._address, self._machine)
                self._follow(link, channel, interface_of(own))
            except (EOFError, OSError) as error:
                log.warning("the first machine is lost%s", f": {error}" if str(error) else "")
                self._stopped.wait(AGAIN_SECONDS)
            finally:
                link.close()

    def _join(self) -> Join:
        own = self._devices
        return Join(
            machine=self._machine,
            software=str(self._software),
            ranks=own.ranks,
            device=own.type,
            bfloat16=supports_bfloat16(own),
        )

    def _follow(self, link: Link, channel: Channel, interface: str) -> None:
        """Raises EOFError or OSError where the first machine is lost."""
        part: _Part | None = None
        told = True  # why the last part has ended
        shown = 0.0

        def post(message) -> None:
            link.post(channel.frame(message))

        def show() -> None:  # also while processes take their time to end, or this machine would count as lost
            nonlocal shown
            if time.monotonic() - shown > SHOWN_SECONDS:
                shown = time.monotonic()
                seen = {"run": "", "memory": [], "lines": [], "quiet": False}
                if part is not None:
                    seen = {"run": part.run, "memory": part.memory(), "lines": part.lines(), "quiet": part.quiet}
                post(Seen(**seen))

        try:
            while not self._stopped.is_set():
                received = link.receive(LOOK_SECONDS / 5)
                message = received[0] if received is not None else None
                if isinstance(message, Run):
                    if part is not None:
                        old, part = part, None
                        meanwhile(old.close, show)
                    try:
                        part, told = self._begin(message, interface), False
                    except PoolError as error:  # no room for its files, say: the next run may have it
                        post(Broke(run=message.run, order=0, text=str(error), lines=[]))
                elif isinstance(message, Stop) and part is not None:
                    meanwhile(part.stop, show)
                elif isinstance(message, Awaits):
                    self._awaited = message.what
                elif isinstance(message, Leave):
                    log.info("the first machine was told to end")
                    self._stopped.set()
                elif isinstance(message, Failed):
                    raise ProtocolError(message.text)
                if part is not None and (suspicion := part.look(self._awaited)) is not None:
                    meanwhile(partial(part.condemn, suspicion), show)
                show()
                if part is not None and not told and not part.processes.alive:
                    told = True
                    post(part.report())
            wait([link.post(channel.frame(Leave()))], LAST_SECONDS)
        finally:
            if part is not None:
                part.close()

    def _begin(self, run: Run, interface: str) -> _Part:
        """Raises PoolError."""
        self._software.check()
        place = Place(
            machine=self._machine,
            run=run.run,
            address=self._address,
            key=self._key,
            interface=interface,
            addresses=tuple(run.addresses),
        )
        self._awaited = "start"
        return _Part(self._devices, place, self._machine * self._devices.ranks)
