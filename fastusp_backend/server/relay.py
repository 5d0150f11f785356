"""What one client asks for, taken to the workers, and their answers to it."""

import time
from collections.abc import Callable

from msgspec.structs import replace

from ..errors import Cancelled, PoolError, RequestError
from ..pool import Pool, Progress
from ..pool.contact import Contact
from ..pool.link import POLL_SECONDS
from ..pool.request import CANCEL_SECONDS, NotSent
from ..protocol import Cancel, Done, Failed, Held, Message, Park, Phase, Release
from .client import Client
from .turns import Job


class _Others(Exception):
    """The workers are not those that the client is attached to any more."""


class Relay:
    """everybody: the clients, who all hear what the workers hold."""

    def __init__(self, pool: Pool, everybody: Callable[[], list[Client]]):
        self._pool, self._everybody = pool, everybody
        self._user: Client | None = None  # whose model, and patches, the weights are

    def run(self, client: Client, job: Job) -> None:
        """Returns when the client is answered, or gone, or was told that the workers have ended."""
        message = job.message
        if isinstance(message, Release | Park) and self._user not in (None, client) and not self._user.gone:
            client.post(Done(id=message.id))  # another one's weights
            return
        progress = Progress(
            phase=lambda text: client.post(Phase(id=message.id, text=text)),
            interrupted=lambda: client.wants_no_more(message.id),
        )
        try:
            self._pool.run(lambda workers: self._take(client, job, workers), progress)
        except _Others:
            client.end("the workers were started anew; the next prompt attaches to them")
        except Cancelled as cancelled:
            client.post(Failed(id=message.id, kind="cancelled", rank=0, text=str(cancelled)))
        except RequestError as refused:
            client.post(Failed(id=message.id, kind="refused", rank=0, text=str(refused)))
        except PoolError as error:
            client.end(str(error))

    def _take(self, client: Client, job: Job, workers: Contact) -> None:
        """Sends the workers a client's message and posts all that they answer to it."""
        if workers is not client.workers:
            raise _Others
        number = workers.next_id()
        message = client.numbers.translate(job.message, job.tensors, number)
        if not isinstance(message, Release | Park):
            self._user = client
        try:
            workers.send(message, job.tensors)
        except OSError as error:
            raise NotSent from error
        try:
            self._follow(client, job.message.id, number, workers)
        except (EOFError, OSError) as error:
            raise workers.failure("stopped while a prompt ran") from error

    def _follow(self, client: Client, asked: int, number: int, workers: Contact) -> None:
        """asked: the client's number of the request. Raises Cancelled where the workers take their time to stop, and
        EOFError or OSError where they are gone."""
        stopped_at = None
        while True:
            if stopped_at is None and client.wants_no_more(asked):
                workers.post(Cancel(id=number))
                stopped_at = time.monotonic()
            received = workers.receive(POLL_SECONDS)
            if received is None:
                if not workers.alive:
                    raise EOFError
                if stopped_at is not None and time.monotonic() - stopped_at > CANCEL_SECONDS:
                    workers.leave_behind(number)
                    raise Cancelled("it was cancelled; the workers will come to it")
                continue
            answer, tensors = received
            if isinstance(answer, Held):
                self._tell(answer)
            elif isinstance(answer, Failed) and answer.id is None:
                raise RequestError(f"the workers refused a message: {answer.text}")
            elif answer.id == number:
                client.post(replace(answer, id=asked), tensors)
                if isinstance(answer, Done | Failed):
                    return

    def _tell(self, held: Message) -> None:
        for client in self._everybody():
            if client.workers is not None:
                client.post(held)
