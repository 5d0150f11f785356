"""How a rank shows that it gets on: a small file in its pool's run directory, mapped by it and by the pool.

A rank counts what it has done and says by when it will have done more. Nothing is sent for that, so it costs nothing,
and a rank that has stopped, or waits for one that has, shows it by saying nothing.
"""

import array
import contextlib
import mmap
import os
from pathlib import Path
from typing import NamedTuple

# Words of eight bytes: each is written and read in one piece, so that no reader meets half of one.
_COUNT, _SECONDS, _PROCESS = range(3)
_TEXT = slice(8 * 3, 128)
_MEMORY = slice(16, 20)
_BYTES = 4096

COLD_SECONDS = 600.0
"""How long a rank may take from beat to beat where nothing is known of its pace: to compile a block, to start."""
COLD_CPU_SECONDS = 1800.0
"""The same on CPUs: one block of an image of 4096 x 4096."""
USUAL_SECONDS = 300.0
"""The same for what is done in small parts: reading a tensor, patching a weight, making a group of ranks."""


class Sign(NamedTuple):
    """What a rank last showed.

    count: how many beats it has made.
    seconds: within how many seconds of the last one the next is due.
    doing: what it is at, as in worker/activity.py.
    """

    pid: int
    count: int
    seconds: float
    doing: str


class Memory(NamedTuple):
    """What a rank last showed of its memory, in bytes.

    weights: on its device.
    own: all that it has: of a GPU, by torch; of a host, resident.
    free, total: the device's, or the host's.
    """

    weights: int
    own: int
    free: int
    total: int


class Pulse:
    """A rank's end. Without a path it shows itself to nobody: in the host, in tests."""

    def __init__(self, path: Path | None = None):
        """Makes the file. Raises OSError where there is no room for it."""
        self._count = 0
        self._seconds = COLD_SECONDS
        if path is None:
            self._map(bytearray(_BYTES))
            return
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, _BYTES)  # a page that finds no room when it is written to ends the process
            self._map(mmap.mmap(fd, _BYTES))
        finally:
            os.close(fd)
        self.beat()
        self._integers[_PROCESS] = os.getpid()  # last: from now on it is read

    def _map(self, memory: bytearray | mmap.mmap) -> None:
        self._memory = memory
        self._integers, self._floats = memoryview(memory).cast("Q"), memoryview(memory).cast("d")

    def beat(self, seconds: float | None = None) -> None:
        """Something is done; the next beat comes within `seconds`, or in the time that was said last."""
        self._count += 1
        if seconds is not None:
            self._seconds = seconds
        self._floats[_SECONDS] = self._seconds
        self._integers[_COUNT] = self._count

    def turn_to(self, doing: str) -> None:
        """What the rank is at from now on."""
        text = doing.encode()[: _TEXT.stop - _TEXT.start]
        self._memory[_TEXT] = text.ljust(_TEXT.stop - _TEXT.start, b"\0")

    def show_memory(self, memory: Memory) -> None:
        self._integers[_MEMORY] = memoryview(array.array("Q", memory))


_own = Pulse()


def start(path: Path) -> None:
    """Has this process, a rank, show its pulse in a file. Raises OSError."""
    global _own
    _own = Pulse(path)


def beat(seconds: float | None = None) -> None:
    """This process' `Pulse.beat`."""
    _own.beat(seconds)


def turn_to(doing: str) -> None:
    """This process' `Pulse.turn_to`."""
    _own.turn_to(doing)


def show_memory(memory: Memory) -> None:
    """This process' `Pulse.show_memory`."""
    _own.show_memory(memory)


class Reader:
    """The pool's end: a rank's file, mapped as soon as it is there. It may be removed afterwards."""

    def __init__(self, path: Path):
        self._path = path
        self._memory: mmap.mmap | None = None

    def read(self) -> Sign | None:
        """What the rank shows; None before it has made its file."""
        if not self._mapped():
            return None
        try:
            with memoryview(self._memory) as memory, memory.cast("Q") as integers, memory.cast("d") as floats:
                pid, count, seconds = integers[_PROCESS], integers[_COUNT], floats[_SECONDS]
                text = bytes(memory[_TEXT]).rstrip(b"\0").decode(errors="replace")
        except ValueError:
            return None  # it was closed
        return Sign(pid, count, seconds, text) if pid else None

    def memory(self) -> Memory | None:
        """What the rank shows of its memory; None before it has."""
        if not self._mapped():
            return None
        try:
            with memoryview(self._memory) as memory, memory.cast("Q") as integers:
                shown = Memory(*integers[_MEMORY])
        except ValueError:
            return None  # it was closed
        return shown if shown.total else None

    def _mapped(self) -> bool:
        if self._memory is None:
            try:
                with open(self._path, "rb") as file:
                    self._memory = mmap.mmap(file.fileno(), _BYTES, prot=mmap.PROT_READ)
            except (OSError, ValueError):  # it is not there, or being made; or this process can open no file now
                return False
        return True

    def close(self) -> None:
        """Lets go of the file. May be called while another thread reads."""
        if self._memory is not None:
            with contextlib.suppress(BufferError):  # being read: it goes with the last reference then
                self._memory.close()
