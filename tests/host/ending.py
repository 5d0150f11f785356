"""Processes that are to end."""

import time
from pathlib import Path

from support import parent


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def with_torchrun(pids: list[int]) -> list[int]:
    """The ranks and the process that started them."""
    return [*pids, parent(pids[0])]


def wait_for_the_end(pids: list[int], seconds: float) -> list[int]:
    """Those that still live after so long."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if lives(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
