"""The workers of a pool from their start to their end: the control channel to them, what they have, why they ended."""

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import AuthenticationError

from ..config import Layout, ModelSpec, Settings
from ..devices import Devices, cuda_visible
from ..errors import PoolError, ProtocolError
from ..prompt import Tensors
from ..protocol import (
    VERSION,
    Cancel,
    Channel,
    Done,
    Evaluate,
    Failed,
    Held,
    Hello,
    Message,
    Patch,
    Ready,
    Release,
    Sample,
    Unmap,
)
from ..protocol.messages import ToClient
from .cause import full_disk, last_log_lines
from .hangs import LOOK_SECONDS, Awaited, HangDetector
from .link import POLL_SECONDS, Link
from .processes import Processes
from .rundir import RunDir
from .sent import SentPatches, SentTensors

log = logging.getLogger(__name__)

DEATH_SECONDS = 8.0
"""How long processes may take to end when one of them has."""


class Workers:
    """Starts the processes at once and returns. Threads of its own connect to them and watch over them: workers that
    hang are ended.

    processes: torchrun and its ranks.
    ready: what they said when they were ready, None before.
    layout, settings, model: those of the last request.
    sent, answered: the last request or order that went to them, and the last one that they answered, in order.
    held: what they last said of their weights.
    tensors, patches: what they were sent and have, for the caller whose turn it is.
    """

    def __init__(self, devices: Devices, changed: Callable[[], None] = lambda: None):
        """changed: called when they are ready, and when they have ended. Raises DeviceError where a device does not
        exist."""
        cuda_visible(devices)
        self.devices = devices
        self._changed = changed
        self.run_dir = RunDir()
        self.ready: Ready | None = None
        self.layout: Layout | None = None
        self.settings: Settings | None = None
        self.model: ModelSpec | None = None
        self.sent = self.answered = 0
        self.held: Held | None = None
        self.tensors, self.patches = SentTensors(), SentPatches()
        self._ids = itertools.count(1)
        self.channel: Channel | None = None
        self._link: Link | None = None
        self._behind = 0  # the last request or order whose answer nobody waits for
        self._unread = 0  # the last evaluation: its answer says that its tensors were read
        self._refused = False  # a message, and perhaps memory that came with it
        self._unsent = False  # an evaluation whose caller was interrupted, and perhaps memory that goes with it
        self._hangs = HangDetector(self.run_dir.path, devices.ranks)
        self._condemned = False  # they are being asked where they are, and answer nothing else any more
        self._why: str | None = None  # this process ended them
        self._where: list[str] = []
        self.processes = Processes(devices, self.run_dir.path)
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
                if (suspicion := self._hangs.look(self._awaited)) is not None:
                    self._condemned = True
                    self._end(*self._hangs.accuse(suspicion))
        except Exception as error:
            log.exception("the FastUSP workers on %s cannot be watched any more", self.devices)
            self._end(f"they could not be watched any more ({type(error).__name__}: {error})")
        self._changed()

    @property
    def _awaited(self) -> Awaited | None:
        if self.ready is None:
            return "start"
        if self.behind:
            return "end of what was left behind"
        return "answer" if self.sent > self.answered else None

    def _hear(self, message: Message) -> None:
        if isinstance(message, Held):
            self.held = message
        elif isinstance(message, Failed) and message.id is None:
            self._refused = True
        elif isinstance(message, Done | Failed):
            self.answered = max(self.answered, message.id)

    def last_request(self) -> dict:
        """For `Pool.status`: model, layout and options of the last request, in words; of the options those that are not
        the default."""
        given, usual = self.settings or Settings(), Settings()
        options = {name: getattr(given, name) for name in Settings.__struct_fields__}
        changed = [f"{name} {value}" for name, value in options.items() if value != getattr(usual, name)]
        model = os.path.basename(self.model.path) if self.model else None
        return {"model": model, "layout": str(self.layout) if self.layout else None, "options": ", ".join(changed)}

    def memory(self) -> list[dict | None]:
        """What each rank last showed of its memory, as `pulse.Memory`; None before it has shown any."""
        shown = [pulse.memory() for pulse in self._hangs.pulses]
        return [memory._asdict() if memory is not None else None for memory in shown]

    @property
    def alive(self) -> bool:
        return self.processes.alive

    @property
    def behind(self) -> bool:
        """Whether they are still at a request or order whose answer nobody waits for, or about to end."""
        return self._condemned or (self._behind > self.answered and not self._link.ended)

    def leave_behind(self, number: int) -> None:
        """Nobody waits any more for the answer to this request or order."""
        self._behind = number

    def stop_forgotten(self) -> None:
        """Cancels and leaves behind what nobody waits for though nobody has said so: an interrupt may come anywhere in
        its caller, also where it cancels."""
        if self.alive and self.sent > self.answered and not self.behind:
            self.post(Cancel(id=self.sent))
            self.leave_behind(self.sent)

    def next_id(self) -> int:
        """The number of a request or order to come."""
        return next(self._ids)

    def send(
        self, message: Message, tensors: Tensors | None = None, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        """Sends a request or an order to workers that are ready, as `Link.send`. An evaluation's tensors lie where the
        last one's did, as soon as those were read."""
        evaluates = isinstance(message, Evaluate)
        if isinstance(message, Evaluate | Sample):
            self.layout, self.settings = message.layout, message.settings
        if isinstance(message, Evaluate | Sample | Patch):
            self.model = message.model
        if isinstance(message, Release | Unmap) or (evaluates and self._memory_in_doubt):
            self.channel.forget()
            self._refused = self._unsent = False
        if isinstance(message, Release):  # now: whether it arrives may not be seen
            self.tensors.doubt()
            self.patches.unload()
        self._unsent = self._unsent or evaluates
        frame = self.channel.frame(message, tensors, lasting=evaluates)
        if evaluates:
            self._unread = message.id
        self.sent = message.id
        self._link.send(frame, meanwhile)
        if evaluates:
            self._unsent = False

    @property
    def _memory_in_doubt(self) -> bool:
        """Whether the ranks may read the last evaluation's tensors still, or may never have had their memory."""
        return self._refused or self._unsent or self._unread > self.answered

    def post(self, message: Message) -> None:
        """Sends what is not answered, when those before it have been taken."""
        self._link.post(self.channel.frame(message))

    def receive(self, seconds: float) -> tuple[Message, Tensors] | None:
        """Receives as `Link.receive`; what workers say that are about to end does not count."""
        received = self._link.receive(seconds)
        if self._condemned:
            raise EOFError
        return received

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
        self.processes.kill(self.ready.pids if self.ready else ())

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
        cause = (self._why or self.processes.cause(self.model)) + full_disk(directory)
        text = f"The FastUSP workers on {self.devices} {event}: {cause}. The next prompt starts new ones."
        log_lines = [f"  {line}" for line in last_log_lines(directory)]
        return PoolError("\n".join([text, *self._where, *["Last log lines:"][: len(log_lines)], *log_lines]))
