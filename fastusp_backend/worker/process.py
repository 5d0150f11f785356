"""What a worker process needs of its operating system: to die with its parent, and to leave a trace when it fails."""

import ctypes
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

RUN_DIR_VARIABLE = "FASTUSP_RUN_DIR"
PARENT_VARIABLE = "FASTUSP_PARENT_PID"
STORE_VARIABLE = "FASTUSP_STORE"
"""Holds the path of the file that is the ranks' store."""

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Asks Linux to kill this process when its parent dies (torchrun gives every rank a session of its own).

    parent: the expected parent's pid; if it is gone already, this process ends at once. A no-op on other systems, where
    the end of the control socket is what ends the workers.
    """
    if not sys.platform.startswith("linux"):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)


class _JsonLines(logging.Formatter):
    def __init__(self, rank: int):
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 3), "rank": self._rank, "level": record.levelname}
        line["text"] = record.getMessage()
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_pool(run_dir: Path, rank: int) -> None:
    """Appends this process's log records to the pool's one log file, a JSON object a line."""
    handler = logging.FileHandler(run_dir / "pool.log", mode="a", encoding="utf-8")
    handler.setFormatter(_JsonLines(rank))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def record_failure(run_dir: Path, rank: int, error: BaseException) -> None:
    """Leaves why this rank ends, for the client to find: failure-<rank>.json."""
    text = f"{type(error).__name__}: {error}"
    lost = isinstance(error, RuntimeError) and any(x in str(error) for x in ("Connection closed", "Connection reset"))
    record = {"rank": rank, "text": text, "peer_lost": lost, "time": time.time()}
    (run_dir / f"failure-{rank}.json").write_text(json.dumps(record), encoding="utf-8")
