"""How a caller follows a request, and what its own exceptions do to it."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import Cancelled
from ..prompt import Tensors
from ..protocol import Done, Step
from .link import POLL_SECONDS


def _nothing(*_) -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How a caller follows a request. All are called on the thread that called `Pool.run`; an exception from any
    of them cancels the request, and is raised there.

    step: called with each step and its tensors x and denoised.
    phase: called with what happens before the first step.
    done: called with the answer of a request that ended well.
    interrupted: polled; True cancels the request, and `Pool.run` raises Cancelled.
    """

    step: Callable[[Step, Tensors], None] = _nothing
    phase: Callable[[str], None] = _nothing
    done: Callable[[Done], None] = _nothing
    interrupted: Callable[[], bool] = lambda: False

    def go_on(self) -> None:
        """Raises Cancelled where the caller has had enough, or what `interrupted` raises."""
        if self.interrupted():
            raise Cancelled("interrupted before the workers had the request")

    @contextlib.contextmanager
    def acquired(self, lock: threading.Lock) -> Iterator[None]:
        """Has a lock, which another request may have for long. Raises as `go_on` while it waits."""
        while not lock.acquire(timeout=POLL_SECONDS):
            self.go_on()
        try:
            yield
        finally:
            lock.release()


QUIET = Progress()


class CallersOwn(Exception):
    """Carries an exception of the caller's callbacks (ComfyUI's interruption among them) past those of the channel."""

    def __init__(self, error: BaseException):
        self.error = error


def call(callback: Callable, *arguments):
    """Calls one of the caller's callbacks. Raises CallersOwn for whatever it raises."""
    try:
        return callback(*arguments)
    except BaseException as error:
        raise CallersOwn(error) from error
