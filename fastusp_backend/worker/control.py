"""Rank 0's end of the control channel: a thread that reads requests, a thread that sends replies.

Cancelling works at any time because reading never waits for the ranks, and a slow client never holds up a step because
sending does not either.
"""

import logging
import os
import queue
import threading
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Listener

import torch

from ..errors import ProtocolError
from ..protocol import VERSION, Cancel, Channel, Failed, Hello, Message, Ready
from ..protocol.messages import ToWorker

log = logging.getLogger(__name__)

CLIENT_GONE = 3
"""Exit code of a rank 0 whose client went away; torchrun then ends the other ranks."""


class Control:
    """Listens at `address` for the one client of this pool; `ready` is what greets it. on_death leaves a trace of
    why this rank ends."""

    def __init__(self, address: str, key: bytes, ready: Ready, on_death: Callable[[BaseException], None]):
        self._ready = ready
        self._inbox: queue.Queue[tuple[Message, dict[str, torch.Tensor]]] = queue.Queue()
        self._outbox: queue.Queue[Callable[[Channel], None]] = queue.Queue()
        self._cancelled: set[int] = set()
        self._channel: Channel | None = None
        self._listener = Listener(address, family="AF_UNIX", backlog=4, authkey=key)
        for work in (self._read_clients, self._write):
            threading.Thread(target=_or_end, args=(work, on_death), name=work.__name__, daemon=True).start()

    def next_request(self) -> tuple[Message, dict[str, torch.Tensor]]:
        """Waits for the next request."""
        return self._inbox.get()

    def cancelled(self, request: int) -> bool:
        return request in self._cancelled

    def send(self, message: Message | Callable[[], Message], tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Queues a reply, or what makes one once its tensors are there: those on a GPU are copied to the host while the
        GPU goes on."""
        staged, ready = _to_host(tensors or {})

        def deliver(channel: Channel) -> None:
            if ready is not None:
                ready.synchronize()
            channel.send(message() if callable(message) else message, staged)

        self._outbox.put(deliver)

    def _write(self) -> None:
        while True:
            deliver = self._outbox.get()
            channel = self._channel
            if channel is None:
                continue
            try:
                deliver(channel)
            except OSError as error:
                gone = isinstance(error, ConnectionError) or self._channel is not channel
                if not gone:
                    raise  # a reply that is lost would leave its client waiting for ever
                log.info("a reply found no client")

    def _read_clients(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except (AuthenticationError, EOFError, OSError) as error:
                log.warning("a client was refused: %s", error or type(error).__name__)
                continue
            channel = Channel(connection, ToWorker)
            try:
                self._greet(channel)
                self._read(channel)
            except EOFError:
                if self._channel is not None:
                    log.info("the client is gone; ending")
                    os._exit(CLIENT_GONE)
                log.warning("a client left before it was greeted")
            except (ProtocolError, OSError) as error:
                log.warning("a client was dropped: %s", error)
            finally:
                self._channel = None
                channel.close()

    def _greet(self, channel: Channel) -> None:
        hello, _ = channel.receive()
        if not isinstance(hello, Hello) or hello.version != VERSION:
            text = f"expected Hello of protocol version {VERSION}, got {hello}"
            channel.send(Failed(id=None, kind="protocol", rank=0, text=text))
            raise ProtocolError(text)
        channel.send(self._ready)
        self._channel = channel

    def _read(self, channel: Channel) -> None:
        while True:
            try:
                message, tensors = channel.receive()
            except ProtocolError as error:
                log.warning("%s", error)
                channel.send(Failed(id=None, kind="protocol", rank=0, text=str(error)))
                continue
            if isinstance(message, Cancel):
                self._cancelled.add(message.id)
            elif isinstance(message, Hello):
                channel.send(Failed(id=None, kind="protocol", rank=0, text="Hello was said before"))
            else:
                self._inbox.put((message, tensors))


def _or_end(work: Callable[[], None], on_death: Callable[[BaseException], None]) -> None:
    """A rank 0 that cannot hear or speak any more must not live on."""
    try:
        work()
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
