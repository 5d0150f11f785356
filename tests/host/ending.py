"""Processes that are to end."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from support import parent, wait_until


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def with_torchrun(pids: list[int]) -> list[int]:
    """The ranks and the process that started them."""
    return [*pids, parent(pids[0])]


@contextlib.contextmanager
def held_up(host: int, seconds: float) -> Iterator[None]:
    """Holds up the ranks that what is done inside has a ComfyUI start."""
    before = _torchruns(host)
    yield
    wait_until(lambda: _torchruns(host) - before, 30)
    (started,) = _torchruns(host) - before
    os.kill(started, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(started, signal.SIGCONT)


def _torchruns(host: int) -> set[int]:
    """The processes that start the ranks of its pools."""
    children = " ".join(file.read_text() for file in Path(f"/proc/{host}/task").glob("*/children"))
    return {int(pid) for pid in children.split() if b"worker.launch" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def wait_for_the_end(pids: list[int], seconds: float) -> list[int]:
    """Those that still live after so long."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if lives(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
