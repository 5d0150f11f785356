"""The client's end of the control channel, with a thread that writes and one that reads: whoever waits here can be
interrupted at any time (Stop, Ctrl-C), and neither leaves half a frame behind nor waits for a process that hangs."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

from ..errors import ProtocolError
from ..prompt import Tensors
from ..protocol import Channel, Frame, Message

POLL_SECONDS = 0.05


class Link:
    """heard is called with each message as it arrives, on the thread that reads. One that it says True to is received
    by nobody else."""

    def __init__(self, channel: Channel, heard: Callable[[Message], bool | None]):
        """Raises RuntimeError where this process gets no more threads."""
        self._channel, self._heard = channel, heard
        self._closing = threading.Lock()
        self._outbox: queue.SimpleQueue[tuple[Frame, Future[None]] | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[tuple[Message, Tensors] | BaseException] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._write, self._read)]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError:
            self._outbox.put(None)  # or one that has started would wait for ever
            raise

    @property
    def ended(self) -> bool:
        """Whether nothing arrives any more."""
        return not self._threads[1].is_alive()

    def post(self, frame: Frame) -> "Future[None]":
        """Has a frame sent after those before it."""
        written: Future[None] = Future()
        self._outbox.put((frame, written))
        if not self._threads[0].is_alive():
            self._refuse()
        return written

    def send(self, frame: Frame, meanwhile: Callable[[], None]) -> None:
        """Sends a frame. While the other end does not take it, meanwhile() is called now and then; what it raises is
        raised, and the frame goes on its way all the same. Raises OSError when the other end is gone."""
        written = self.post(frame)
        while not wait([written], POLL_SECONDS).done:
            meanwhile()
        written.result()

    def receive(self, seconds: float) -> tuple[Message, Tensors] | None:
        """What arrived next; None if nothing does in time. Raises as `Channel.receive`; after the stream's end, each
        time."""
        try:
            item = self._inbox.get(timeout=seconds)
        except queue.Empty:
            return None
        if not isinstance(item, BaseException):
            return item
        if not isinstance(item, ProtocolError):
            self._inbox.put(item)  # the last one
        raise item

    def close(self) -> None:
        """Ends the stream, and with it both threads, and the waiting of those that send. May be called twice."""
        with self._closing:
            self._channel.shut()
            self._outbox.put(None)
            for thread in self._threads:
                thread.join()  # or they would use a descriptor that is another file's by then
            self._channel.close()
            self._refuse()

    def _refuse(self) -> None:
        """Tells those whose frames came too late, when the thread that writes has ended."""
        while True:
            try:
                item = self._outbox.get_nowait()
            except queue.Empty:
                return
            if item is not None:
                item[1].set_exception(BrokenPipeError("the channel was closed"))

    def _write(self) -> None:
        while (item := self._outbox.get()) is not None:
            frame, written = item
            try:
                self._channel.write(frame)
                written.set_result(None)
            except BaseException as error:  # told to who sends it
                written.set_exception(error)
            del item, frame  # or its memory would stay until something else is sent

    def _read(self) -> None:
        while True:
            try:
                message, tensors = self._channel.receive()
            except ProtocolError as error:
                if error.message is not None:
                    self._heard(error.message)
                self._inbox.put(error)
            except BaseException as error:  # the end of the stream, mostly; told to who receives
                self._inbox.put(error)
                return
            else:
                if not self._heard(message):
                    self._inbox.put((message, tensors))
                del message, tensors  # or their memory would stay until something else arrives
