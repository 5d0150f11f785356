"""Workers of a server: this process attaches to them, and lets them be when it goes."""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from msgspec.structs import replace

from ..config import ModelSpec
from ..devices import ServerDevices
from ..door import enter
from ..errors import FastUSPError, PoolError
from ..library import named
from ..prompt import Tensors
from ..protocol import (
    LOST_SECONDS,
    Attach,
    Channel,
    Ended,
    Found,
    Held,
    Message,
    Ready,
    Shown,
    Welcome,
)
from ..protocol.messages import ToAttached
from ..pulse import Memory
from ..side_door import find, look
from .cause import LOG_LINES
from .contact import Contact
from .link import POLL_SECONDS, Link
from .log import LINES, WorkerLog

log = logging.getLogger(__name__)


def ask(address: str, key: str) -> ServerDevices:
    """What a server at host:port has. key: the path of its key file. Raises DeviceError, KeyFileError or
    ProtocolError."""
    channel, welcome, _ = enter(address, key, ToAttached)
    channel.close()
    return _devices(welcome, address, key)


def _devices(welcome: Welcome, address: str, key: str) -> ServerDevices:
    return ServerDevices(
        ranks=welcome.ranks,
        address=address,
        key=key,
        kind=welcome.device,
        per_machine=welcome.per_machine,
        bfloat16=welcome.bfloat16,
    )


def _come_in(channel: Channel, welcome: Welcome) -> Channel:
    """The channel to which a server answers from now on: on this machine one of its own, by which memory is shared.
    Raises OSError or ProtocolError."""
    sock = find(welcome.side_door)
    if sock is None:
        channel.send(Attach())
        return channel
    with contextlib.ExitStack() as not_let_in:
        not_let_in.callback(sock.close)
        channel.send(Attach(beside=True))
        content = look(sock)
        channel.send(Found(content=content))
        if not content:
            return channel
        not_let_in.pop_all()
    channel.close()
    return Channel(sock, ToAttached)


class AttachedWorkers(Contact):
    """Connects on a thread of its own. Another one notices when nothing is heard of the server any more."""

    def __init__(self, devices: ServerDevices, changed: Callable[[], None] = lambda: None):
        super().__init__(devices, changed)
        self.beginning = f"waiting for the workers of {devices}"
        self._ended = threading.Event()
        self._closing = threading.Lock()
        self._why = ""
        self._said: Ready | None = None
        self._shown: list[dict | None] = []
        self._lines: deque[str] = deque(maxlen=LINES)  # that no log has taken
        self._last: deque[str] = deque(maxlen=LOG_LINES)
        self._own: dict[ModelSpec, ModelSpec] = {}  # what was sent of a file -> what this machine knows of it
        threading.Thread(target=self._attach, name=f"fastusp {devices}", daemon=True).start()

    def _attach(self) -> None:
        try:
            self.channel, self._link = self._enter()
        except (FastUSPError, OSError, RuntimeError) as error:  # the last where this process gets no more threads
            self._end(str(error))
            return
        while not self._ended.wait(POLL_SECONDS):
            if self.ready is None and self._said is not None:
                self.ready = self._said
                names = ", ".join(self.ready.devices)
                way = "in shared memory" if self.channel.shares_memory else "inside TLS"
                log.info("FastUSP: attached to the workers of %s (%s); tensors go %s", self.devices, names, way)
                self._changed()
            if self._link.ended:
                self._end("the connection was lost")
            elif time.monotonic() - self.channel.heard > LOST_SECONDS:  # less than a message counts, on a slow line
                self._end(f"nothing was heard of it for {LOST_SECONDS} s")
        self._link.close()

    def _enter(self) -> tuple[Channel, Link]:
        """Raises as `enter` and `Link`, and PoolError where the server is not what it was."""
        channel, welcome, _ = enter(self.devices.address, self.devices.key, ToAttached)
        try:
            if _devices(welcome, self.devices.address, self.devices.key) != self.devices:
                raise PoolError("it has other devices now; queue the prompt again")
            channel = _come_in(channel, welcome)
            return channel, Link(channel, self._hear)
        except BaseException:
            channel.close()
            raise

    def _hear(self, message: Message) -> bool | None:
        if isinstance(message, Shown):
            self._shown = [shown and Memory(*shown)._asdict() for shown in message.memory]
            self._lines.extend(message.lines)
            self._last.extend(message.lines)
        elif isinstance(message, Ended):
            self._end(message.text)
        elif isinstance(message, Ready):
            self._said = message
        elif isinstance(message, Held):  # a client that asks for nothing hears it as well
            own = self._own.get(message.model, message.model)
            self.held = replace(message, model=own)
        else:
            return super()._hear(message)
        return True

    def _end(self, why: str) -> None:
        with self._closing:
            if self._ended.is_set():
                return
            self._why = why
            self._ended.set()
        self._changed()

    @property
    def alive(self) -> bool:
        return not self._ended.is_set()

    def memory(self) -> list[dict | None]:
        return list(self._shown)

    def write_log(self, log: WorkerLog) -> None:
        taken = [self._lines.popleft() for _ in range(len(self._lines))]
        log.add(taken)

    def send(
        self, message: Message, tensors: Tensors | None = None, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        """As `Contact.send`. Raises EOFError where nothing came from the server for a while."""
        model = getattr(message, "model", None)
        if model is not None:
            sent = named(model)
            self._own[sent] = model
            if self.held is not None and self.held.model == sent:  # another client's file was this one
                self.held = replace(self.held, model=model)
            message = replace(message, model=sent)
        try:
            super().send(message, tensors, meanwhile)
        except OSError as error:
            if time.monotonic() - self.channel.heard < LOST_SECONDS / 2:
                raise  # it has ended, and another may be there at once
            raise EOFError from error  # nothing comes from there: a new connection would be waited for as well

    def receive(self, seconds: float) -> tuple[Message, Tensors] | None:
        """Raises EOFError where the server is lost."""
        received = super().receive(seconds)
        if received is None and not self.alive:
            raise EOFError
        return received

    def give_up(self) -> None:
        self._end("it gave no answer, so ComfyUI left it")

    def part(self, seconds: float) -> None:
        """They are the server's."""

    def dispose(self, why: str | None = None) -> None:
        self._end(why or "ComfyUI left it")
        if self._link is not None:
            self._link.close()

    def failure(self, event: str) -> PoolError:
        self._ended.wait(LOST_SECONDS)
        self.give_up()
        text = f"The FastUSP workers of {self.devices} {event}: {self._why}"
        lines = [] if "Last log lines" in self._why or not self._last else ["Last log lines:"]
        return PoolError("\n".join([text, *lines, *(f"  {line}" for line in self._last if lines)]))
