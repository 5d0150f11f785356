"""Too little of something: memory, descriptors, disk."""

import os
import resource
from pathlib import Path

from ..disk import empty, fill
from .base import ANY, STANDING, Fault, OnRanks


class _Limit(OnRanks):
    """A limit of the system's for a rank, or for the client where the class allows it."""

    moments = STANDING
    allowed = frozenset({"refused", "died"})
    limit = 30.0
    kind = resource.RLIMIT_AS
    of_clients = False

    def draw(self) -> None:
        super().draw()
        self.client = self.of_clients and self.rng.random() < 0.4
        self.more = self.draw_more()
        self._before: dict[int, tuple[int, int]] = {}

    def draw_more(self) -> int:
        """How much more a process gets than it has."""
        raise NotImplementedError

    def has(self, pid: int) -> int:
        raise NotImplementedError

    def strike(self) -> None:
        victims = {-1: os.getpid()} if self.client else self.victims()
        self.detail = f"{self.more} more for {'the client' if self.client else f'rank {[*victims]}'}"
        for pid in victims.values():
            soft, hard = resource.prlimit(pid, self.kind)
            self._before[pid] = soft, hard
            resource.prlimit(pid, self.kind, (self.has(pid) + self.more, hard))

    def lift(self) -> None:
        for pid, limits in self._before.items():
            if os.path.exists(f"/proc/{pid}"):
                resource.prlimit(pid, self.kind, limits)
        if self.client:
            self.world.end_workers()  # those that were started meanwhile have it, too


class Memory(_Limit):
    """A rank gets no more address space than it has, or little more (RLIMIT_AS)."""

    names = r"rank \d|shared memory cannot be mapped"

    def draw_more(self) -> int:
        return self.rng.choice((0, 1 << 16, 1 << 20, 10 << 20, 100 << 20))

    def has(self, pid: int) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


class Descriptors(_Limit):
    """A rank, or the client, can open no more files, or few (RLIMIT_NOFILE)."""

    kind = resource.RLIMIT_NOFILE
    of_clients = True
    names = r"rank \d|[Tt]oo many (open )?files"

    def draw_more(self) -> int:
        return self.rng.randrange(6)

    def has(self, pid: int) -> int:
        return max(int(name) for name in os.listdir(f"/proc/{pid}/fd")) + 1


class FileSize(_Limit):
    """A rank, or the client, can write files of some size alone (RLIMIT_FSIZE)."""

    kind = resource.RLIMIT_FSIZE
    of_clients = True
    names = r"rank \d|[Ff]ree (space|memory)|[Ff]ile too large"

    def draw_more(self) -> int:
        return self.rng.choice((0, 100, 4096, 100_000))

    def has(self, pid: int) -> int:
        return 0


class FullDisk(Fault):
    """The folder for temporary files is full, or nearly."""

    moments = ANY
    allowed = frozenset({"refused", "died"})
    limit = 30.0
    names = "[Ff]ree space|No space left"

    def draw(self) -> None:
        self.free = self.rng.choice((0, 0, 4096, 20_000, 100_000))
        self.detail = f"{self.free} bytes free"

    def strike(self) -> None:
        fill(self.world.base, self.free)

    def lift(self) -> None:
        empty(self.world.base)
