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

from ..prompt import Tensors
from ..protocol import Evaluate, Message, Patch

KEPT_SECONDS = {Evaluate: 1.0, Patch: 5.0}
"""How long a client keeps its turn behind what it has asked for."""
LONGEST_SECONDS = 60.0
"""After which a client keeps no turn while others wait, unless it has just patched the weights."""


class Job(NamedTuple):
    message: Message
    tensors: Tensors


class Turns:
    def __init__(self):
        self._waiting: dict[Hashable, deque[Job]] = {}
        self._served: dict[Hashable, int] = {}  # client -> the number of its last turn
        self._turns = itertools.count(1)
        self._changed = threading.Condition()
        self._last: Hashable | None = None
        self._working = False
        self._since = self._until = 0.0  # of the last one's turn

    def add(self, client: Hashable, job: Job) -> bool:
        """Whether others are before it."""
        with self._changed:
            others = any(jobs for other, jobs in self._waiting.items() if other is not client)
            kept = self._last not in (None, client) and (self._working or self._keeps())
            self._waiting.setdefault(client, deque()).append(job)
            self._changed.notify()
            return others or kept

    def take(self, seconds: float) -> tuple[Hashable, Job] | None:
        """The next client and its job; None where there is none in time. `done` follows."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                client = self._next()
                if client is not None:
                    if client is not self._last:
                        self._last, self._since = client, time.monotonic()
                    self._working = True
                    self._served[client] = next(self._turns)
                    return client, self._waiting[client].popleft()
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(min(left, max(0.01, self._until - time.monotonic())) if self._keeps() else left)

    def done(self, message: Message) -> None:
        """The job that was taken last has ended."""
        with self._changed:
            now = time.monotonic()
            self._working = False
            self._until = now + KEPT_SECONDS.get(type(message), 0.0)
            if now - self._since > LONGEST_SECONDS and not isinstance(message, Patch):
                self._until = 0.0
            self._changed.notify()

    def leave(self, client: Hashable) -> None:
        """The client is gone, and what it has asked for is not wanted."""
        with self._changed:
            self._waiting.pop(client, None)
            self._served.pop(client, None)
            if client is self._last:
                self._until = 0.0
            self._changed.notify()

    def _keeps(self) -> bool:
        return time.monotonic() < self._until

    def _next(self) -> Hashable | None:
        if self._keeps():
            return self._last if self._waiting.get(self._last) else None
        waiting = [client for client, jobs in self._waiting.items() if jobs]
        return min(waiting, key=lambda client: self._served.get(client, 0), default=None)
