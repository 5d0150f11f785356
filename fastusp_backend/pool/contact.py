"""What a client has to do with workers, wherever they run: the conversation over the channel, and what they have."""

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable

from ..config import Layout, ModelSpec, Settings
from ..devices import Devices
from ..errors import PoolError
from ..prompt import Tensors
from ..protocol import (
    Cancel,
    Channel,
    Done,
    Evaluate,
    Failed,
    Held,
    Message,
    Patch,
    Ready,
    Release,
    Sample,
    Unmap,
)
from .link import Link
from .log import WorkerLog
from .sent import SentPatches, SentTensors


class Contact(ABC):
    """Workers from when they are asked for to their end, which they do not come back from.

    beginning: what happens until they are ready, for people.
    ready: what they said when they were ready, None before.
    layout, model: those of the last request.
    settings: its user's, with those that ranks never read; whoever sends it sets them.
    sent, answered: the last request or order that went to them, and the last one that they answered, in order.
    held: what they last said of their weights.
    tensors, patches: what they were sent and have, for the caller whose turn it is.
    """

    beginning: str

    def __init__(self, devices: Devices, changed: Callable[[], None]):
        """changed: called when they are ready, and when they have ended."""
        self.devices = devices
        self._changed = changed
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
        self._unread = 0  # the last that had tensors to compute from: its answer says that they were read
        self._refused = False  # a message, and perhaps memory that came with it
        self._unsent = False  # one whose caller was interrupted, and perhaps memory that goes with it

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether they answer, or may yet."""

    @abstractmethod
    def memory(self) -> list[dict | None]:
        """What each rank last showed of its memory, as `pulse.Memory`; None before it has shown any."""

    @abstractmethod
    def write_log(self, log: WorkerLog) -> None:
        """Has the log take what they have written since the last time."""

    @abstractmethod
    def give_up(self) -> None:
        """Has done with workers that should have answered, or ended by themselves."""

    @abstractmethod
    def part(self, seconds: float) -> None:
        """Has nothing more to ask of workers that are free; waits so long for their end, if this is it."""

    @abstractmethod
    def dispose(self, why: str | None = None) -> None:
        """Has done with them and removes all traces. why: for a prompt that they are taken from."""

    @abstractmethod
    def failure(self, event: str) -> PoolError:
        """Why they do not answer any more, with their last log lines."""

    def _hear(self, message: Message) -> bool | None:
        """As `Link` calls it."""
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

    @property
    def behind(self) -> bool:
        """Whether they are still at a request or order whose answer nobody waits for, or about to end."""
        return self._behind > self.answered and not self._link.ended

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
        """Sends a request or an order to workers that are ready, as `Link.send`. The tensors of an evaluation, or of a
        sampling run, lie where the last ones did, as soon as those were read."""
        evaluates = isinstance(message, Evaluate | Sample)
        if evaluates:
            self.layout = message.layout
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
        """Whether the ranks may read the last tensors still, or may never have had their memory."""
        return self._refused or self._unsent or self._unread > self.answered

    def post(self, message: Message) -> None:
        """Sends what is not answered, when those before it have been taken."""
        self._link.post(self.channel.frame(message))

    def receive(self, seconds: float) -> tuple[Message, Tensors] | None:
        """Receives as `Link.receive`."""
        return self._link.receive(seconds)
