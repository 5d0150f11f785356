"""Whose request is next: clients take turns, a request each.

One that evaluates step by step, or has just patched the weights, keeps its turn for the moment until its next request
comes: other weights in between would cost both clients more than they wait.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Hashable
from typing import NamedTuple

from ..errors import RequestError
from ..prompt import Tensors
from ..protocol import MAX_FRAME, Evaluate, Message, Patch

KEPT_SECONDS = {Evaluate: 1.0, Patch: 5.0}
"""How long a client keeps its turn behind what it has asked for."""
LONGEST_SECONDS = 60.0
"""After which a client keeps no turn while others wait, unless it has just patched the weights."""
WAITING = 16
"""Requests of a client that may wait at a time: our own sends one, and goes on where one was given up."""
CLIENT_BYTES = MAX_FRAME
"""Of the tensors of a client's waiting requests: a single one may have as many."""
ALL_BYTES = 4 * MAX_FRAME
"""Of all clients', with those of the one that is under way."""


class Job(NamedTuple):
    message: Message
    tensors: Tensors

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Turns:
    def __init__(self):
        self._waiting: dict[Hashable, deque[Job]] = {}
        self._place: dict[Hashable, int] = {}  # client -> its place: behind all that waited when it began to
        self._places = itertools.count()
        self._changed = threading.Condition()
        self._last: Hashable | None = None
        self._working: Job | None = None
        self._since = self._until = 0.0  # of the last one's turn

    def add(self, client: Hashable, job: Job) -> bool:
        """Whether others are before it. Raises RequestError where too much waits already."""
        with self._changed:
            self._check_room(client, job)
            others = any(jobs for other, jobs in self._waiting.items() if other is not client)
            kept = self._last not in (None, client) and (self._working or self._keeps())
            jobs = self._waiting.setdefault(client, deque())
            if not jobs:
                self._place[client] = next(self._places)
            jobs.append(job)
            self._changed.notify()
            return others or kept

    def drop(self, client: Hashable, number: int) -> bool:
        """Whether the client's request `number` was waiting, which it does no longer."""
        with self._changed:
            jobs = self._waiting.get(client, ())
            found = next((job for job in jobs if job.message.id == number), None)
            if found is not None:
                jobs.remove(found)
            return found is not None

    def take(self, seconds: float) -> tuple[Hashable, Job] | None:
        """The next client and its job; None where there is none in time. `done` follows."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                client = self._next()
                if client is not None:
                    if client is not self._last:
                        self._last, self._since = client, time.monotonic()
                    self._working = self._waiting[client].popleft()
                    return client, self._working
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(min(left, max(0.01, self._until - time.monotonic())) if self._keeps() else left)

    def done(self, message: Message) -> None:
        """The job that was taken last has ended."""
        with self._changed:
            now = time.monotonic()
            self._working = None
            self._until = now + KEPT_SECONDS.get(type(message), 0.0)
            if now - self._since > LONGEST_SECONDS and not isinstance(message, Patch):
                self._until = 0.0
            if self._last in self._place:
                self._place[self._last] = next(self._places)
            else:
                self._forget_last()  # it has left meanwhile
            self._changed.notify()

    def leave(self, client: Hashable) -> None:
        """The client is gone, and what it has asked for is not wanted."""
        with self._changed:
            self._waiting.pop(client, None)
            self._place.pop(client, None)
            if client is self._last and not self._working:
                self._forget_last()
            self._changed.notify()

    def _check_room(self, client: Hashable, job: Job) -> None:
        if job.nbytes > ALL_BYTES:
            raise RequestError(
                f"Use smaller images, batches or LoRAs: {job.nbytes / 1e9:.2f} GB of tensors at a time are too many "
                f"for a server, which takes {ALL_BYTES / 1e9:.2f} GB"
            )
        own = self._waiting.get(client, ())
        of_all = sum(other.nbytes for jobs in self._waiting.values() for other in jobs) + job.nbytes
        if self._working is not None:
            of_all += self._working.nbytes  # not of its client's: it hears of the end a little before this does
        of_client = sum(other.nbytes for other in own) + job.nbytes
        if len(own) >= WAITING or own and of_client > CLIENT_BYTES:
            raise RequestError(
                f"Queue the prompt again when those before it are done: {len(own)} requests of this ComfyUI wait, and "
                f"with it they hold {of_client / 1e9:.2f} GB; {WAITING} and {CLIENT_BYTES / 1e9:.2f} GB may"
            )
        if of_all > ALL_BYTES:
            raise RequestError(
                f"Queue the prompt again later: the requests of all clients hold {of_all / 1e9:.2f} GB with "
                f"it, of {ALL_BYTES / 1e9:.2f} GB that may"
            )

    def _forget_last(self) -> None:
        self._last, self._until = None, 0.0

    def _keeps(self) -> bool:
        return time.monotonic() < self._until

    def _next(self) -> Hashable | None:
        if self._keeps():
            return self._last if self._waiting.get(self._last) else None
        waiting = [client for client, jobs in self._waiting.items() if jobs]
        return min(waiting, key=self._place.__getitem__, default=None)
