"""Which rank hangs: a look at the ranks' pulses and at their processes, now and then, while somebody waits for them.

A rank hangs that was stopped, or that has not beaten for longer than it said it would take (`pulse`). Only time in
which this process itself ran counts, so nobody hangs because a machine was suspended; and a rank that the system has
read memory for since the last look gets on, however slowly.
"""

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple

from .. import pulse
from ..worker.process import STACK_SIGNAL

LOOK_SECONDS = 0.5
STOPPED_SECONDS = 10.0
START_SECONDS = 300.0
"""Less the time in which ranks read their libraries from a disk."""
BEHIND_SECONDS = 300.0
"""How long workers that were told to stop may give no sign, however long they said that it would take: they may be
compiling."""
STACK_SECONDS = 2.0
STACK_LINES = 8

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]

Awaited = Literal["start", "answer", "end of what was left behind"]

_WAITING = ("torch/distributed/", "torch/cuda/streams.py", "/queue.py", "/threading.py")
_WAITING += ("fastusp_backend/comm/", "fastusp_backend/engine/parking.py")  # `Work.wait` is no function of Python's
"""Files in which ranks wait for each other, for their GPUs, for requests."""


class Suspicion(NamedTuple):
    """Names whom `HangDetector.look` takes for hung. ranks: empty where it is not plain who delays the others."""

    what: str
    ranks: list[int]


class Hang(NamedTuple):
    """Says who hangs, and in what: a cause for people, and lines that say where the ranks were. waiting: whether all of
    them waited, and none of them is known to hang."""

    cause: str
    stacks: list[str]
    waiting: bool = False


@dataclass
class _Rank:
    """stack: where it writes its stacks, open as soon as it is there: it may be removed afterwards."""

    pulse: pulse.Reader
    sign: pulse.Sign | None = None
    stack: IO[bytes] | None = None
    faults: int = 0
    still: float = 0.0
    stopped: float = 0.0


class HangDetector:
    """Looks at the ranks of one run directory, as often as it is told to. first: the number of the first one."""

    def __init__(self, directory: Path, ranks: int, first: int = 0):
        self._directory, self._first = directory, first
        self._ranks = [_Rank(pulse.Reader(directory / f"pulse-{first + number}")) for number in range(ranks)]
        self._awaited: Awaited | None = None
        self._waited = 0.0
        self._last = time.monotonic()

    @property
    def pulses(self) -> list[pulse.Reader]:
        """What the ranks show, in their order."""
        return [rank.pulse for rank in self._ranks]

    def look(self, awaited: Awaited | None) -> Suspicion | None:
        """Whether anybody hangs. awaited: what somebody waits for; only while that is something do ranks hang."""
        now = time.monotonic()
        passed, self._last = min(now - self._last, 2 * LOOK_SECONDS), now
        if awaited != self._awaited:
            self._awaited, self._waited = awaited, 0.0
            for rank in self._ranks:
                rank.still = rank.stopped = 0.0
        if awaited is None:
            return None
        read = [self._look_at(number, rank, passed) for number, rank in enumerate(self._ranks)]
        if not any(read):
            self._waited += passed
        return self._judge()

    def where(self) -> list[str]:
        """Lines that say where the ranks are."""
        return self._lines(self._stacks(), range(len(self._ranks)))

    def _stacks(self) -> list[list[str]]:
        """Every rank's stack, innermost first, empty where it does not tell. What was stopped goes on to do so."""
        asked = {}
        for number, rank in enumerate(self._ranks):
            self._open(number, rank)
            if rank.sign is not None and rank.stack is not None:
                with contextlib.suppress(OSError, ValueError):  # it has ended; the pool is closed meanwhile
                    asked[number] = os.fstat(rank.stack.fileno()).st_size
                    os.kill(rank.sign.pid, STACK_SIGNAL)
                    os.kill(rank.sign.pid, signal.SIGCONT)
        deadline = time.monotonic() + STACK_SECONDS
        told: list[list[str]] = [[] for _ in self._ranks]
        while time.monotonic() < deadline and any(not told[number] for number in asked):
            time.sleep(0.05)  # a stack is written line by line
            for number, start in asked.items():
                told[number] = _stack(self._ranks[number].stack, start)
        return told

    def close(self) -> None:
        """Lets go of the ranks' files."""
        for rank in self._ranks:
            rank.pulse.close()
            if rank.stack is not None:
                rank.stack.close()

    def _open(self, number: int, rank: _Rank) -> None:
        rank.sign = rank.pulse.read()
        if rank.sign is not None and rank.stack is None:
            with contextlib.suppress(OSError):  # this process can open no file now
                rank.stack = open(self._directory / f"stack-{self._first + number}", "rb")  # noqa: SIM115 - as long as the pool lives

    def _look_at(self, number: int, rank: _Rank, passed: float) -> bool:
        """Whether the system has read memory for the rank since the last look."""
        last, faults = rank.sign, rank.faults
        self._open(number, rank)
        if rank.sign is None:
            return False
        state, rank.faults = _process(rank.sign.pid)
        read = rank.faults > faults
        same = last is not None and last.count == rank.sign.count and not read
        rank.still = rank.still + passed if same else 0.0
        rank.stopped = rank.stopped + passed if state == "T" else 0.0
        return read

    def _judge(self) -> Suspicion | None:
        stopped = [n for n, rank in enumerate(self._ranks) if rank.stopped >= STOPPED_SECONDS]
        if stopped:
            return Suspicion("was stopped (SIGSTOP, Ctrl-Z)", stopped)
        if self._awaited == "start":
            late = self._waited >= START_SECONDS
            return Suspicion(f"was not ready within {START_SECONDS:.0f} s of the start,", []) if late else None
        most = BEHIND_SECONDS if self._awaited != "answer" else float("inf")
        if any(rank.sign is None or rank.still < min(rank.sign.seconds, most) for rank in self._ranks):
            return None
        return Suspicion(f"made no progress for {min(rank.still for rank in self._ranks):.0f} s", [])

    def accuse(self, suspicion: Suspicion) -> Hang:
        """Who it is and where they are; those that wait for nobody, where it is not known. The ranks may do anything
        afterwards but answer well."""
        stacks, everybody = self._stacks(), range(len(self._ranks))
        waiting = not suspicion.ranks and all(stack and _waits(stack) for stack in stacks)
        ranks = suspicion.ranks or [n for n in everybody if stacks[n] and not _waits(stacks[n])] or list(everybody)
        signs = [(n, self._ranks[n].sign) for n in ranks]
        names = [f"rank {self._first + n}" + (f" (process {sign.pid})" if sign else "") for n, sign in signs]
        doing = signs[0][1].doing if signs[0][1] else "while it imported its libraries"
        return Hang(f"{' and '.join(names)} {suspicion.what} {doing}", self._lines(stacks, ranks), waiting)

    def _lines(self, stacks: list[list[str]], full: Sequence[int]) -> list[str]:
        lines = []
        for number, stack in enumerate(stacks):
            shown, rank = stack[: STACK_LINES if number in full else 1], self._first + number
            lines += [f"Rank {rank} was in:" if shown else f"Rank {rank} did not say where it was"]
            lines += [f"  {line}" for line in shown]
        return lines


def _stack(file: IO[bytes], start: int) -> list[str]:
    """The main thread's lines of what was written from `start` on."""
    try:
        text = os.pread(file.fileno(), 1 << 20, start).decode(errors="replace")
    except (OSError, ValueError):
        return []
    main = text.rpartition("most recent call first")[2]  # the oldest thread comes last
    return [_short(line) for line in main.splitlines() if line.startswith("  File") and _tells(line)]


def _tells(line: str) -> bool:
    return not any(file in line for file in ("c10d_logger.py", "<frozen runpy>"))


def _short(line: str) -> str:
    """A line of a stack, its file from the folder of packages on."""
    for root in ("site-packages/", f"{_PACKAGE_ROOT}/"):
        _, found, rest = line.partition(root)
        if found:
            return f'File "{rest}'
    return line.strip()


def _waits(stack: list[str]) -> bool:
    return any(file in stack[0] for file in _WAITING)


def _process(pid: int) -> tuple[str, int]:
    """(state, pages that were read from a disk) of a process; none of either where the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", 0
    fields = stat.rpartition(")")[2].split()
    return fields[0], int(fields[9])
