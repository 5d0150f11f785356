"""What a worker process needs of its operating system: to die with its parent, and to leave a trace when it fails."""

import ctypes
import json
import logging
import os
import re
import signal
import sys
import time
from pathlib import Path

RUN_DIR_VARIABLE = "FASTUSP_RUN_DIR"
PARENT_VARIABLE = "FASTUSP_PARENT_PID"

_PR_SET_PDEATHSIG = 1

_PEER_LOST = re.compile(
    r"closed by (remote )?peer|peer closed|reset by peer|broken pipe|connection refused|socket (\w+ )?closed"  # gloo
    r"|pair closure|timed out|timeout"
    r"|connection was likely closed|recvvalue failed|sendbytes failed"  # torch's store
    r"|remoteerror|remote process|communicator was aborted|destroyed communicator",  # NCCL
    re.IGNORECASE,
)
"""How gloo's TCP transport, torch's store and NCCL say that another process is gone, or does not come."""


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
    own = not isinstance(error, RuntimeError) or str(error).startswith("CUDA error")  # also of a launch that timed out
    lost = not own and _PEER_LOST.search(str(error)) is not None
    record = {"rank": rank, "text": text, "peer_lost": lost, "time": time.time()}
    (run_dir / f"failure-{rank}.json").write_text(json.dumps(record), encoding="utf-8")
