"""Rank 0's end of the control channel: a thread that reads requests, a thread that sends replies, and one for each
connection until it is known to be the client's.

Cancelling works at any time because reading never waits for the ranks, and a slow client never holds up a step because
sending does not either.
"""

import contextlib
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError

import torch

from ..errors import ProtocolError
from ..protocol import VERSION, Cancel, Channel, Done, Failed, Hello, Message, Ready
from ..protocol.messages import ToWorker

log = logging.getLogger(__name__)

CLIENT_GONE = 3
"""Exit code of a rank 0 whose client went away; torchrun then ends the other ranks."""
GREETING_SECONDS = 10
"""How long a connection may take until it is known to be the client's."""
STRANGERS = 8
"""Connections that are heard at a time before one is known to be the client's."""


class Control:
    """Listens at `address` for the one client of this pool; `ready` is what greets it. on_death leaves a trace of
    why this rank ends."""

    def __init__(self, address: str, key: bytes, ready: Ready, on_death: Callable[[BaseException], None]):
        self._key = key
        self._ready = ready
        self._on_death = on_death
        self._inbox: queue.Queue[tuple[Message, dict[str, torch.Tensor]]] = queue.Queue()
        self._outbox: queue.Queue[Callable[[Channel], None]] = queue.Queue()
        self._cancelled: set[int] = set()
        self._taken = self._answered = 0  # the last request that has arrived, and that has ended
        self._channel: Channel | None = None
        self._greeting = threading.Lock()
        self._strangers = threading.Semaphore(STRANGERS)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)  # in a directory that is the user's alone, and goes with the pool
        self._listener.listen(STRANGERS)
        for work in (self._accept, self._write):
            self._start(work)

    def next_request(self) -> tuple[Message, dict[str, torch.Tensor]]:
        """Waits for the next request."""
        return self._inbox.get()

    def cancelled(self, request: int) -> bool:
        return request in self._cancelled

    def send(self, message: Message | Callable[[], Message], tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Queues a reply, or what makes one once its tensors are there: those on a GPU are copied to the host while the
        GPU goes on."""
        if isinstance(message, Done | Failed):
            self._answered = message.id
        staged, ready = _to_host(tensors or {})

        def deliver(channel: Channel) -> None:
            if ready is not None:
                ready.synchronize()
            channel.send(message() if callable(message) else message, staged)

        self._outbox.put(deliver)

    def _start(self, work: Callable[..., None], *arguments) -> None:
        target = (work, self._on_death, *arguments)
        threading.Thread(target=_or_end, args=target, name=work.__name__, daemon=True).start()

    def _write(self) -> None:
        while True:
            deliver = self._outbox.get()
            if self._channel is not None:
                try:
                    deliver(self._channel)
                except ConnectionError:
                    log.info("a reply found no client")  # the thread that reads it ends this rank

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                log.warning("a client was refused: %s", error)
                time.sleep(0.1)  # too many open files, say: it comes again
                continue
            if self._strangers.acquire(blocking=False):
                self._start(self._meet, Channel(sock, ToWorker))
            else:
                log.warning("a client was refused: %d others have not said who they are", STRANGERS)
                sock.close()

    def _meet(self, channel: Channel) -> None:
        try:
            self._greet(channel)
        except (AuthenticationError, EOFError, OSError, ProtocolError) as error:
            log.warning("a client was refused: %s", error or type(error).__name__)
            channel.close()
            return
        finally:
            self._strangers.release()
        try:
            self._read(channel)
        except (EOFError, ConnectionError):
            try:
                log.info("the client is gone; ending")
                self._on_death(EOFError("ComfyUI's end of the control channel was closed"))
            finally:
                os._exit(CLIENT_GONE)

    def _greet(self, channel: Channel) -> None:
        with _limited(channel, GREETING_SECONDS):
            channel.authenticate(self._key, listens=True)
            hello, _ = channel.receive()
            with self._greeting:
                if not isinstance(hello, Hello) or hello.version != VERSION:
                    problem = f"expected Hello of protocol version {VERSION}, got {hello}"
                elif self._channel is not None:
                    problem = "this pool has a client"
                else:
                    channel.send(self._ready)
                    self._channel = channel
                    return
            channel.send(Failed(id=None, kind="protocol", rank=0, text=problem))
            raise ProtocolError(problem)

    def _read(self, channel: Channel) -> None:
        while True:
            try:
                message, tensors = channel.receive()
            except ProtocolError as error:
                log.warning("%s", error)
                channel.send(Failed(id=None, kind="protocol", rank=0, text=str(error)))
                continue
            if isinstance(message, Hello):
                channel.send(Failed(id=None, kind="protocol", rank=0, text="Hello was said before"))
            elif not isinstance(message, Cancel):
                self._taken = getattr(message, "id", self._taken)
                self._inbox.put((message, tensors))
            elif message.id > self._taken or message.id <= self._answered:  # a frame was refused, here or there
                channel.send(Failed(id=message.id, kind="cancelled", rank=0, text="it is not under way"))
            else:
                self._cancelled.add(message.id)


@contextlib.contextmanager
def _limited(channel: Channel, seconds: float) -> Iterator[None]:
    """Ends the stream after some seconds, unless it is left before."""
    timer = threading.Timer(seconds, channel.shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _or_end(work: Callable[..., None], on_death: Callable[[BaseException], None], *arguments) -> None:
    """A rank 0 that cannot hear or speak any more must not live on."""
    try:
        work(*arguments)
    except BaseException as error:
        try:
            log.exception("a control thread failed")
            on_death(error)
        finally:
            os._exit(1)  # also where no trace can be left, as on a full disk


def _to_host(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.cuda.Event | None]:
    if not any(t.is_cuda for t in tensors.values()):
        return tensors, None
    staged = {name: torch.empty_like(t, device="cpu", pin_memory=True) for name, t in tensors.items()}
    for name, t in tensors.items():
        staged[name].copy_(t, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return staged, ready
