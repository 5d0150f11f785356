"""One request to the workers: sent, followed to its end, cancelled."""

import time
from collections.abc import Callable

from ..errors import Cancelled, FastUSPError, OutOfRoom, PatchesLost, ProtocolError, RequestError, TensorsLost
from ..prompt import Tensors
from ..protocol import Cancel, Done, Failed, Held, Message, Phase, Step
from .contact import Contact
from .link import POLL_SECONDS
from .progress import CallersOwn, Progress, call

CANCEL_SECONDS = 5.0
"""How long a cancel waits for its answer. Loading and compiling do not hear it: the request is then left behind, and
its late replies are dropped."""

_REFUSALS = {"unpatched": PatchesLost, "unkept": TensorsLost}
"""`Failed.kind` -> what is raised for it."""


class NotSent(Exception):
    """The workers were gone before they had the request; its cause is the channel's error."""


def submit(
    workers: Contact,
    message: Message,
    tensors: Tensors,
    progress: Progress,
    meanwhile: Callable[[], None] = lambda: None,
) -> Tensors:
    """Sends a request, waits for its answer, and gives its tensors. Cancels what it does not see the end of.
    meanwhile: called once the request is on its way, before anything is heard of it.

    Raises Cancelled, RequestError (refused; the workers go on), PoolError (they died, or hang), NotSent, ProtocolError,
    or what the caller's callbacks raise.
    """
    try:
        try:
            workers.send(message, tensors, lambda: call(progress.go_on))
        except OSError as error:
            raise NotSent from error
        call(meanwhile)
        return follow(workers, message.id, progress)
    except (NotSent, Cancelled, RequestError):
        raise
    except (OSError, EOFError) as error:
        raise workers.failure("stopped while a prompt ran") from error
    except CallersOwn as own:
        cancel(workers, message.id, progress)
        raise own.error from own.error.__cause__
    except BaseException:  # Ctrl-C; or one message was refused, but the request may run
        cancel(workers, message.id, progress)
        raise


def follow(
    workers: Contact, number: int, progress: Progress, had_enough: Callable[[], bool] = lambda: False
) -> Tensors:
    """Waits for the answer to request `number`, and gives its tensors. had_enough: polled once it is cancelled; True
    leaves it behind at once.

    Raises Cancelled, RequestError (refused), ProtocolError (one message was not understood; the request may run),
    CallersOwn, or EOFError or OSError where the workers are gone.
    """
    cancelled_at = None
    while True:
        if cancelled_at is None and call(progress.interrupted):
            workers.post(Cancel(id=number))
            cancelled_at = time.monotonic()
        received = workers.receive(POLL_SECONDS)
        if received is None:
            if not workers.alive:
                raise EOFError
            if cancelled_at is not None and (call(had_enough) or time.monotonic() - cancelled_at > CANCEL_SECONDS):
                workers.leave_behind(number)
                raise Cancelled(f"request {number} was cancelled; the workers will come to it")
            continue
        message, tensors = received
        if isinstance(message, Failed) and message.id is None:
            raise ProtocolError(f"the workers refused a message: {message.text}")
        if message.id != number or isinstance(message, Held):
            continue  # the reply of a request that was given up, or what `Workers` has seen to
        if isinstance(message, Step):
            if cancelled_at is None:
                call(progress.step, message, tensors)
        elif isinstance(message, Phase):
            call(progress.phase, message.text)
        elif isinstance(message, Done):
            call(progress.done, message)
            return tensors
        elif message.kind == "cancelled":
            raise Cancelled(f"request {number} was cancelled")
        elif message.kind == "out_of_memory":
            device = workers.ready.devices[message.rank]
            raise OutOfRoom(f"rank {message.rank} ({device}) ran out of memory {message.text}")
        else:
            raise _REFUSALS.get(message.kind, RequestError)(message.text)


def cancel(workers: Contact, number: int, progress: Progress) -> None:
    """Cancels a request and waits for its end, so that the next one finds the ranks free; not where its caller is
    stopped meanwhile."""
    try:
        follow(workers, number, Progress(interrupted=lambda: True), progress.interrupted)
    except CallersOwn:
        workers.leave_behind(number)  # whoever cannot be asked is not kept waiting
    except (FastUSPError, OSError, EOFError):
        pass  # ended, one way or another; the caller's exception is what is raised
