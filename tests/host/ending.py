"""Processes that are to end."""

import time
from pathlib import Path


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def with_torchrun(pids: list[int]) -> list[int]:
    """The ranks and the process that started them."""
    return [*pids, int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])]


def wait_for_the_end(pids: list[int], seconds: float) -> list[int]:
    """Those that still live after so long."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if lives(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
