"""What all faults have."""

import os
import random
import signal
import threading

from ..requests import ENDLESS, FINITE, PATCHES, Request
from ..scene import Moment
from ..world import World

ANY = ("idle", "start", "load", "delay", "step")
STANDING = ("idle", "load", "delay", "step")
"""Moments at which the workers are ready."""


class Fault:
    """A kind of fault; an object is one of them, all of which `rng` decides.

    moments, requests: of which one is drawn. allowed: how the request may end (`scene.How`), beside with the right
    latents where it has an end. limit: seconds from the fault to an error. keeps: the workers must stay. cancels,
    raises: what the caller does from then on: Stop, or an exception of its own from that callback. detail: what it was,
    in words. names: a pattern that an error's text must hold.
    """

    moments: tuple[str, ...] = ANY
    requests: tuple[str, ...] = FINITE
    allowed: frozenset[str] = frozenset()
    limit = 10.0
    keeps = False
    cancels = False
    raises = ""
    detail = ""
    names = ""

    def __init__(self, world: World, rng: random.Random):
        self.world, self.rng = world, rng
        self.request = Request(rng.choice(self.requests), rng.choice(world.models), rng.choice(PATCHES))
        self.moment = self.draw_moment()
        self.threads: list[threading.Thread] = []
        """Of the fault's own."""
        self.other = self.request.model
        """The model whose latents may be right, too."""
        self.draw()

    def draw(self) -> None:
        """Decides what else there is to decide, from `rng`."""

    def draw_moment(self) -> Moment:
        kind = self.rng.choice(self.moments)
        amount = {
            "idle": lambda: 0,
            "start": lambda: self.rng.uniform(0.05, 6.0) * self.world.slowness,
            "load": lambda: 10 ** self.rng.uniform(-3, -0.5) * self.world.slowness,
            "delay": lambda: 10 ** self.rng.uniform(-3, 0.3 if self.request.endless else -0.7) * self.world.slowness,
            "step": lambda: min(self.rng.randrange(12), self.rng.randrange(self.request.steps)),
        }[kind]()
        return Moment(kind, amount)

    @property
    def patience(self) -> float:
        """Seconds after which a request that goes on is stopped."""
        return self.limit + 5.0

    def prepare(self) -> None:
        """Before the request."""

    def strike(self) -> None:
        raise NotImplementedError

    def lift(self) -> None:
        """When the request has ended. The next prompt comes then."""
        for thread in self.threads:
            thread.join()

    def run_beside(self, thread: threading.Thread) -> None:
        """Until `lift`."""
        thread.daemon = True
        self.threads.append(thread)
        thread.start()

    def is_right(self, latents) -> str:
        """As `World.compare`."""
        return self.world.compare(self.request, latents)


class Endless(Fault):
    """Where the fault shall end the request."""

    requests = ENDLESS


class OnRanks(Fault):
    """Something is done to some of the ranks. victims: of those that there are at that time."""

    def draw(self) -> None:
        self.number = self.rng.randrange(1 << 30)
        self.all = self.rng.random() < 0.2

    def victims(self) -> dict[int, int]:
        """rank -> process: one of them, seldom all. Empty where there is none yet."""
        ranks = dict(sorted(self.world.ranks().items()))
        if self.all or not ranks:
            return ranks
        return dict([list(ranks.items())[self.number % len(ranks)]])

    def told(self, victims: dict[int, int]) -> str:
        """A pattern that names one of them."""
        return "(" + "|".join(rf"rank {rank} \(process {pid}\)" for rank, pid in victims.items()) + ")"


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has ended; what comes of that is looked at all the same


def name_of_signal(number: int) -> str:
    return signal.Signals(number).name
