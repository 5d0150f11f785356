"""The first machine's view of the others: who is there, what their parts of a run are at, why one ended."""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ..devices import Devices, supports_bfloat16
from ..errors import PoolError, ProtocolError
from ..meeting import Board
from ..pool.link import POLL_SECONDS, Link
from ..pool.log import LINES
from ..pool.processes import Place
from ..protocol import LOST_SECONDS, Channel, Message
from ..protocol.machines import Awaits, Broke, Join, Leave, Run, Seen, Stop
from ..pulse import Memory
from .interfaces import interface_of
from .software import Software

log = logging.getLogger(__name__)

SURE = 2
"""Up to which `Broke.order` a machine's report is a cause, rather than what another's end did to it."""


class Report(NamedTuple):
    order: int
    text: str
    lines: list[str]


class Machine:
    """One that has joined, until its connection ends."""

    def __init__(self, number: int, address: str, channel: Channel):
        self.number, self.address = number, address
        self.heard = time.monotonic()
        self.expect("")
        self._channel = channel
        self._lines: deque[str] = deque(maxlen=LINES)
        self.link = Link(channel, self._hear)

    def __str__(self) -> str:
        return f"machine {self.number} ({self.address})"

    def expect(self, run: str) -> None:
        """Of a run that begins: what it still says of those before does not count."""
        self.run = run
        self.seen = Seen(run=run, memory=[], lines=[], quiet=False)
        self.report: Report | None = None
        """Why its part of the run ended; None while it runs."""

    def post(self, message: Message) -> None:
        self.link.post(self._channel.frame(message))

    def take_lines(self) -> list[str]:
        taken = [self._lines.popleft() for _ in range(len(self._lines))]
        return [f"{self.address} {line}" for line in taken]

    def _hear(self, message: Message) -> bool | None:
        self.heard = time.monotonic()
        if isinstance(message, Seen):
            self._lines.extend(message.lines)
            if message.run == self.run:
                self.seen = message
            return True
        if isinstance(message, Broke) and message.run == self.run:
            self.report = Report(message.order, f"{message.text}, on {self}", message.lines)
        return None


class Machines:
    """count: how many there are, this one among them. here: this machine's address, port: the server's, key: the path
    of its key file. complete: called when all are there. ended: called when one was told to end."""

    def __init__(
        self,
        devices: Devices,
        count: int,
        here: str,
        port: int,
        key: str,
        complete: Callable[[], None],
        ended: Callable[[], None],
    ):
        """Raises RequestError where `here` is no address of this machine."""
        self.count, self.devices, self._software = count, devices, Software()
        self._interface = interface_of(here)
        self._here, self._address, self._key = here, f"{here}:{port}", key
        self._complete, self._ended = complete, ended
        self._machines: dict[int, Machine] = {}
        self._lock = threading.Lock()
        self._run, self._board = "", Board()
        self._broke: Callable[[str | None, bool], None] = lambda why, sure: None

    def __str__(self) -> str:
        """The other ones, for people."""
        return " or ".join(map(str, self._all()))

    def begin(self, broke: Callable[[str | None, bool], None]) -> Place:
        """Has all machines start their parts of a new run, and says where they meet.

        broke: called when a part ends, with why where its machine cannot tell it, and whether it is plainly the cause.

        Raises PoolError where some are not there, or what they agreed in has changed here.
        """
        self._software.check()
        with self._lock:
            missing = [number for number in range(1, self.count) if number not in self._machines]
            if missing:
                raise PoolError(
                    f"Start `serve --node-rank {missing[0]}` on its machine: {len(self._machines) + 1} of {self.count} "
                    "machines are there"
                )
            self._run, self._board, self._broke = secrets.token_hex(6), Board(), broke
            others = [self._machines[number] for number in range(1, self.count)]
            addresses = [self._here, *(machine.address for machine in others)]
            for machine in others:
                machine.expect(self._run)
                machine.post(Run(run=self._run, addresses=addresses))
            return Place(
                machine=0,
                run=self._run,
                address=self._address,
                key=self._key,
                interface=self._interface,
                addresses=tuple(addresses),
            )

    def end(self, run: str) -> None:
        """Has all machines end their parts of a run. May be called twice, and when another run has begun."""
        with self._lock:
            if run == self._run:
                self._board.close()
                for machine in self._machines.values():
                    machine.post(Stop())

    def leave(self) -> None:
        """Has all machines end."""
        for machine in self._all():
            machine.post(Leave())

    def board(self, run: str) -> Board | None:
        """That of the run, if it goes on."""
        return self._board if run == self._run else None

    def wait_for(self, run: str, what: str | None) -> None:
        """Tells all machines what somebody waits for of a run."""
        with self._lock:
            if run == self._run:
                for machine in self._machines.values():
                    machine.post(Awaits(what=what))

    @property
    def quiet(self) -> bool:
        """Whether all their ranks have been still for longer than they said."""
        return all(machine.seen.quiet for machine in self._all())

    def memory(self) -> list[dict | None]:
        """As `Contact.memory`, of the other machines' ranks."""
        shown = [memory for machine in self._all() for memory in machine.seen.memory]
        return [memory and Memory(*memory)._asdict() for memory in shown]

    def lines(self) -> list[str]:
        """What was written to their logs since the last time."""
        return [line for machine in self._all() for line in machine.take_lines()]

    def reports(self, run: str, seconds: float) -> list[Report]:
        """Why their parts of a run have ended: waits so long for all of them, unless another run begins."""
        deadline = time.monotonic() + seconds
        while True:
            with self._lock:
                reports = [machine.report for machine in self._machines.values() if machine.run == run]
            if None not in reports or time.monotonic() > deadline:
                return [report for report in reports if report is not None]
            time.sleep(0.02)

    def serve(self, join: Join, address: str, channel: Channel) -> None:
        """Returns when the machine is gone. Raises ProtocolError where it is none of these."""
        own = self.devices
        if not 0 < join.machine < self.count:
            raise ProtocolError(f"Give --node-rank 1 to {self.count - 1}, not {join.machine}: --nnodes is {self.count}")
        if join.software != str(self._software):
            raise ProtocolError(
                f"Install the same FastUSP and torch on all machines: machine {join.machine} has {join.software}, the "
                f"first one {self._software}"
            )
        if (join.ranks, join.device, join.bfloat16) != (own.ranks, own.type, supports_bfloat16(own)):
            raise ProtocolError(
                f"Give --gpus {own.ranks} {own.type} devices of the kind that the first machine has, not {join.ranks} "
                f"{join.device} ones"
            )
        machine, complete = self._add(join.machine, address, channel)
        log.info("%s has joined", machine)
        if complete:
            threading.Thread(target=self._complete, daemon=True).start()
        try:
            lost = self._listen(machine)
        finally:
            with self._lock:
                del self._machines[machine.number]
                broke = self._broke  # of the run that it was in: no other begins before it, or another one, has joined
            machine.link.close()
        log.warning("%s %s", machine, lost)
        broke(f"{machine} {lost}", True)

    def _add(self, number: int, address: str, channel: Channel) -> tuple[Machine, bool]:
        """A machine, and whether all are there now. One that was lost, and comes again, waits until that is noticed.
        Raises ProtocolError where another one stays in its place."""
        deadline = time.monotonic() + LOST_SECONDS + 1
        while True:
            with self._lock:
                if number not in self._machines:
                    machine = self._machines[number] = Machine(number, address, channel)
                    return machine, len(self._machines) == self.count - 1
                other = self._machines[number]
            if time.monotonic() > deadline:
                raise ProtocolError(f"Give another --node-rank than {number}: {other} has joined")
            time.sleep(POLL_SECONDS)

    def _listen(self, machine: Machine) -> str:
        """How it ended."""
        while True:
            if time.monotonic() - machine.heard > LOST_SECONDS:
                return f"was not heard of for {LOST_SECONDS} s"
            try:
                received = machine.link.receive(POLL_SECONDS)
            except (EOFError, OSError):
                return "is not connected any more"
            if received is None:
                continue
            message, _ = received
            if isinstance(message, Leave):
                self._ended()
                return "was told to end"
            if isinstance(message, Broke):
                with self._lock:
                    broke = self._broke if message.run == self._run else None
                if broke is not None:
                    broke(None, message.order <= SURE)

    def _all(self) -> list[Machine]:
        with self._lock:
            return [self._machines[number] for number in sorted(self._machines)]
