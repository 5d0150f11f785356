"""The workers that a pool starts on this machine, from their start to their end: whether they hang, why they ended."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import AuthenticationError

from ..devices import Devices, cuda_visible
from ..errors import PoolError, ProtocolError
from ..prompt import Tensors
from ..protocol import VERSION, Channel, Hello, Message, Ready, Shutdown
from ..protocol.messages import ToClient
from .cause import full_disk, last_log_lines
from .contact import Contact
from .hangs import LOOK_SECONDS, Awaited, Hang, HangDetector, Suspicion
from .link import POLL_SECONDS, Link
from .log import WorkerLog
from .processes import Place, Processes
from .rundir import RunDir

log = logging.getLogger(__name__)

DEATH_SECONDS = 8.0
"""How long processes may take to end when one of them has."""


class Workers(Contact):
    """Starts the processes at once and returns. Threads of its own connect to them and watch over them: workers that
    hang are ended.

    processes: torchrun and its ranks.
    """

    def __init__(self, devices: Devices, changed: Callable[[], None] = lambda: None, place: Place | None = None):
        """place: of several machines. Raises DeviceError where a device does not exist."""
        cuda_visible(devices)
        super().__init__(devices, changed)
        self.beginning = f"starting {devices.ranks} worker(s) on {devices}"
        self.run_dir = RunDir()
        self._hangs = HangDetector(self.run_dir.path, devices.ranks)
        self._condemned = False  # they are being asked where they are, and answer nothing else any more
        self._why: str | None = None  # this process ended them
        self._where: list[str] = []
        self.processes = Processes(devices, self.run_dir.path, place)
        for work in (self._connect, self._guard):
            threading.Thread(target=work, name=f"fastusp {devices}", daemon=True).start()

    def _connect(self) -> None:
        began = time.monotonic()
        while not self.processes.wait_until_ended(POLL_SECONDS):
            channel = None
            try:
                channel = Channel.connect(self.run_dir.address, ToClient)
                channel.authenticate(self.run_dir.key, listens=False)
                channel.send(Hello(version=VERSION))
                reply, _ = channel.receive()
                if not isinstance(reply, Ready) or reply.version != VERSION:
                    raise ProtocolError(str(reply))
            except ProtocolError as error:
                channel.close()
                self._end(f"they speak another protocol version: {error}; restart ComfyUI")
            except (EOFError, OSError, AuthenticationError):  # not yet, or they are ending
                if channel is not None:
                    channel.close()
            else:
                self._link = Link(channel, self._hear)
                self.channel, self.ready = channel, reply
                if not self.alive:
                    self._link.close()  # perhaps after `dispose`
                who, seconds = f"{self.devices} ({', '.join(reply.devices)})", time.monotonic() - began
                log.info("FastUSP: the workers on %s are ready, %.1f s after their start", who, seconds)
                self._changed()
                return

    def _guard(self) -> None:
        try:
            while not self.processes.wait_until_ended(LOOK_SECONDS):
                if (suspicion := self._suspect()) is not None:
                    self._condemned = True
                    hang = self._accuse(suspicion)
                    self._end(hang.cause, hang.stacks)
        except Exception as error:
            log.exception("the FastUSP workers on %s cannot be watched any more", self.devices)
            self._end(f"they could not be watched any more ({type(error).__name__}: {error})")
        self._changed()

    def _suspect(self) -> Suspicion | None:
        return self._hangs.look(self._awaited)

    def _accuse(self, suspicion: Suspicion) -> Hang:
        return self._hangs.accuse(suspicion)

    @property
    def _awaited(self) -> Awaited | None:
        if self.ready is None:
            return "start"
        if self.behind:
            return "end of what was left behind"
        return "answer" if self.sent > self.answered else None

    def memory(self) -> list[dict | None]:
        shown = [pulse.memory() for pulse in self._hangs.pulses]
        return [memory._asdict() if memory is not None else None for memory in shown]

    @property
    def alive(self) -> bool:
        return self.processes.alive

    @property
    def behind(self) -> bool:
        return self._condemned or super().behind

    def receive(self, seconds: float) -> tuple[Message, Tensors] | None:
        """Receives as `Link.receive`; what workers say that are about to end does not count."""
        received = super().receive(seconds)
        if self._condemned:
            raise EOFError
        return received

    def write_log(self, log: WorkerLog) -> None:
        log.take(self.run_dir.path)

    def part(self, seconds: float) -> None:
        self.post(Shutdown())
        self.processes.wait_until_ended(seconds)

    def give_up(self) -> None:
        """Ends processes that should have answered, or ended by themselves; `failure` then tells where they were."""
        if self.alive:
            self._end(None, self._hangs.where())

    def _end(self, why: str | None, where: Sequence[str] = ()) -> None:
        """Ends all processes. why: None where they may tell it themselves; where: lines that say where they were."""
        self._why, self._where = why, [*where]
        self.kill()

    def kill(self) -> None:
        """Ends all processes at once."""
        self.processes.kill(self.ready.pids[: self.devices.ranks] if self.ready else ())

    def dispose(self, why: str | None = None) -> None:
        """Kills what still runs and removes all traces. why: for a prompt that it is taken from."""
        if self.alive:
            self._why = self._why or why
        self.kill()
        if self._link is not None:
            self._link.close()
        self._hangs.close()
        self.run_dir.remove()

    def failure(self, event: str) -> PoolError:
        """Tells why the workers ended: the rank that failed first, its error or signal, and the last log lines. Waits
        for torchrun's own account of it, and ends workers that do not end by themselves."""
        if not self.processes.wait_until_ended(DEATH_SECONDS):
            self.give_up()
        directory = self.run_dir.path
        cause = self._cause() + full_disk(directory)
        text = f"The FastUSP workers on {self.devices} {event}: {cause}. The next prompt starts new ones."
        log_lines = [f"  {line}" for line in last_log_lines(directory)]
        return PoolError("\n".join([text, *self._where, *["Last log lines:"][: len(log_lines)], *log_lines]))

    def _cause(self) -> str:
        return self._why or self.processes.cause(self.model)
