"""What a pool's workers have written, kept beyond their end, for people who read along."""

import json
import os
import threading
import time
from collections import deque
from pathlib import Path

from .cause import listed

LINES = 2000
"""How many lines are kept of a pool."""


class WorkerLog:
    """The last lines of all files that the workers of one pool write: the ranks' log, torchrun's, what ranks print.
    Lines are numbered from the pool's beginning on."""

    def __init__(self):
        self._lines: deque[str] = deque(maxlen=LINES)
        self._count = 0
        self._read: dict[tuple[str, int], int] = {}  # run directory, inode (logs are renamed) -> bytes that were read
        self._lock = threading.Lock()

    def take(self, directory: Path) -> None:
        """Reads what the workers of a run directory have written since the last time."""
        with self._lock:
            logs = [directory / name for name in ("torchrun.log", "pool.log.1", "pool.log")]
            for path in [*logs, *listed(directory, "ranks/**/std*.log")]:
                for line in self._news(path, directory.name):
                    new = _from_log(line) if path.name.startswith("pool") else [f"{_printer(path)} {line}"]
                    self._lines.extend(new)
                    self._count += len(new)

    def add(self, lines: list[str]) -> None:
        """Takes lines that were read elsewhere."""
        with self._lock:
            self._lines.extend(lines)
            self._count += len(lines)

    def since(self, number: int) -> tuple[list[str], int]:
        """Returns those lines from `number` on that are kept, and the number of the next one to come."""
        with self._lock:
            first = self._count - len(self._lines)
            skipped = 0 if number > self._count else max(0, number - first)
            return list(self._lines)[skipped:], self._count

    def _news(self, path: Path, directory: str) -> list[str]:
        try:
            with open(path, "rb") as file:
                which = directory, os.fstat(file.fileno()).st_ino
                size = file.seek(0, os.SEEK_END)
                began = self._read.get(which, 0)
                if size < began:  # cut to its newest half, of which little is new
                    self._read[which] = size
                    return []
                file.seek(began)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return []  # it is not there, or was renamed, and is read the next time
        self._read[which] = began + len(whole) + len(newline)
        return whole.decode(errors="replace").splitlines() if newline else []


def _from_log(line: str) -> list[str]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return [line]  # its writer died in the middle of it
    clock = time.strftime("%H:%M:%S", time.localtime(record["time"]))
    text = f"{clock} [rank {record['rank']}] {record['level']}: {record['text']}"
    return [*text.splitlines(), *record.get("trace", "").splitlines()]


def _printer(path: Path) -> str:
    return "[torchrun]" if path.name == "torchrun.log" else f"[rank {path.parent.name} {path.stem}]"
