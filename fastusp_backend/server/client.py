"""One attached client: what it asks for, and what it is told."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait

from ..errors import ProtocolError, RequestError
from ..pool import Pool
from ..pool.contact import Contact
from ..pool.link import POLL_SECONDS, Link
from ..prompt import Tensors
from ..protocol import (
    MAX_FRAME,
    Cancel,
    Channel,
    Done,
    Ended,
    Failed,
    Message,
    Park,
    Patch,
    Phase,
    Release,
    SharedMemory,
    SharedTensors,
    Shown,
    Unmap,
)
from ..protocol.messages import Request
from .meanwhile import meanwhile
from .numbers import ClientNumbers, WorkerNumbers
from .turns import Job, Turns

log = logging.getLogger(__name__)

SHOWN_SECONDS = 1.0
UNSENT, UNSENT_BYTES = 256, MAX_FRAME
"""Messages, and their bytes, that may wait for a client to take them: a run of many steps, on a slow line."""
LAST_SECONDS = 2.0
"""How long the last message may take to leave."""


class Client:
    """Attached to one set of workers, and gone with them: a client that comes back is another one.

    name: its address, for people.
    workers: those that it is attached to; None before they are asked for.
    """

    def __init__(self, name: str, channel: Channel, pool: Pool, turns: Turns):
        self.name = name
        self.workers: Contact | None = None
        self.numbers: ClientNumbers | None = None
        self._channel, self._pool, self._turns = channel, pool, turns
        self._cancelled: set[int] = set()
        self._taken = self._answered = 0
        self._lasting: SharedMemory | None = None  # where its evaluations' tensors lie
        self._unsent: deque[tuple[Future[None], int]] = deque()
        self._posting = threading.Lock()
        self._told = 0.0
        _, self._line = pool.log_since(0)
        self._link = Link(channel, self._too_early)

    @property
    def gone(self) -> bool:
        return self._link.ended

    def wants_no_more(self, number: int) -> bool:
        """Whether nobody waits for request `number`."""
        return self.gone or number in self._cancelled

    def attach(self, numbers: Callable[[Contact], WorkerNumbers]) -> bool:
        """Waits until the workers are ready, and tells them so. Whether the client is attached then. numbers: gives
        those of the workers."""
        workers = meanwhile(self._pool.start, self._show)  # what the last ones left may take a while to go
        while workers.alive and workers.ready is None and not self.gone:
            time.sleep(POLL_SECONDS)
            self._show()
        if not workers.alive:
            self.end(str(workers.failure("did not start")))
        if self.gone or not workers.alive:
            return False
        self.numbers = ClientNumbers(numbers(workers))
        self.workers = workers
        self.post(workers.ready)
        if workers.held is not None:
            self.post(workers.held)
        return True

    def serve(self) -> None:
        """Returns when it is gone."""
        while True:
            try:
                received = self._link.receive(POLL_SECONDS)
            except ProtocolError as error:
                log.warning("%s: %s", self.name, error)
                self.post(Failed(id=None, kind="protocol", rank=0, text=str(error)))
                continue
            except (EOFError, OSError):
                return
            if received is not None:
                self._hear(*received)
            self._show()

    def post(self, message: Message, tensors: Tensors | None = None) -> None:
        """Sends it, some time. One that does not take what it is sent is let go."""
        if isinstance(message, Done | Failed) and message.id is not None:
            self._answered = max(self._answered, message.id)
            self._cancelled.discard(message.id)
        with self._posting:
            while self._unsent and self._unsent[0][0].done():
                self._unsent.popleft()
            if len(self._unsent) > UNSENT or sum(size for _, size in self._unsent) > UNSENT_BYTES:
                log.warning("%s takes nothing any more, and is let go", self.name)
                self._channel.shut()
                return
            frame = self._channel.frame(message, tensors)
            self._unsent.append((self._link.post(frame), frame.nbytes))

    def end(self, text: str) -> None:
        """Tells why it is served no longer, and closes the connection."""
        written = self._link.post(self._channel.frame(Ended(text=text)))
        wait([written], LAST_SECONDS)
        self._channel.shut()

    def close(self) -> None:
        """Lets go of the connection. From the thread that serves it."""
        if self.numbers is not None:
            self.numbers.leave()
        self._link.close()
        self._lasting = None

    def _too_early(self, message: Message) -> bool:
        """Whether it came before Ready, while nobody takes what arrives: so much could that one that sends it is let
        go."""
        if self.workers is not None:
            return False
        log.warning("%s asked for something before it was told Ready, and is let go", self.name)
        self._channel.shut()
        return True

    def _hear(self, message: Message, tensors: Tensors) -> None:
        if not isinstance(message, Request | Patch | Release | Park | Unmap | Cancel):
            self.post(
                Failed(id=None, kind="protocol", rank=0, text=f"{type(message).__name__} is said once, or elsewhere")
            )
        elif not isinstance(message, Cancel):
            self._taken = message.id
            self._keep(message, tensors)
            model = getattr(message, "model", None)
            if model is not None and not model.fingerprint:  # the workers would open whatever path it says
                text = "Install the same FastUSP here and on the server: a file was asked for by its path, not its name"
                self.post(Failed(id=message.id, kind="refused", rank=0, text=text))
            else:
                self._wait(message, tensors)
        elif message.id > self._taken or message.id <= self._answered:  # a frame was refused, here or there
            self.post(Failed(id=message.id, kind="cancelled", rank=0, text="it is not under way"))
        elif self._turns.drop(self, message.id):
            self.post(Failed(id=message.id, kind="cancelled", rank=0, text="it was waiting for its turn"))
        else:
            self._cancelled.add(message.id)

    def _keep(self, message: Message, tensors: Tensors) -> None:
        """Keeps the memory mapped in which the client will write its next evaluation's tensors, until it is done with
        it."""
        if isinstance(message, Release | Unmap):
            self._lasting = None
        elif isinstance(tensors, SharedTensors) and tensors.memory.lasting:
            self._lasting = tensors.memory

    def _wait(self, message: Message, tensors: Tensors) -> None:
        """Has a request wait for its turn."""
        try:
            others = self._turns.add(self, Job(message, tensors))
        except RequestError as error:
            self.post(Failed(id=message.id, kind="refused", rank=0, text=str(error)))
            return
        if others and isinstance(message, Request | Patch):
            self.post(Phase(id=message.id, text="waiting for another client"))

    def _show(self) -> None:
        """Each second, also while nobody asks for anything."""
        now = time.monotonic()
        if now - self._told >= SHOWN_SECONDS:
            self._told = now
            lines, self._line = self._pool.log_since(self._line)
            shown = self.workers.memory() if self.workers is not None else []
            memory = [tuple(each.values()) if each is not None else None for each in shown]
            self.post(Shown(memory=memory, lines=lines))
