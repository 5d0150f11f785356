"""What a worker process needs of its operating system: to die with its parent, and to leave a trace when it fails."""

import atexit
import contextlib
import ctypes
import faulthandler
import fcntl
import gc
import json
import logging.handlers
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from .. import pulse

RUN_DIR_VARIABLE = "FASTUSP_RUN_DIR"
PARENT_VARIABLE = "FASTUSP_PARENT_PID"
STORE_VARIABLE = "FASTUSP_STORE"
"""Holds the path of the file that is the ranks' store."""
MEETING_VARIABLE = "FASTUSP_MEETING"
"""Of ranks on several machines: the run's name, this machine's number, how many there are, the address of the server
and the path of its key file."""
STACK_SIGNAL = signal.SIGUSR1
"""On which a rank writes its threads' stacks to a file."""

LOG_BYTES = 1 << 20
"""The most bytes that the pool's log has (the one before it stays beside it), and a file of what a rank prints."""

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


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around the import of torch: Python's collector looks again and again at what is made there, and finds nothing.
    That is a fifth of the time. What there is then stays, and is not looked at later either."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def leave(code: int) -> NoReturn:
    """Ends this process. What is registered for its exit runs, but Python takes nothing apart: with torch's modules
    that costs each process a third of a second of a processor."""
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


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


class _PoolLog(logging.handlers.WatchedFileHandler):
    """Appends to the log that all ranks share, and bounds it: rank 0 puts a full one aside, in place of the one before,
    and the others, who write to where the path leads, follow. With each record the files that this process prints to
    are bounded as well. printed: their descriptors."""

    def __init__(self, path: Path, rank: int, printed: tuple[int, ...]):
        super().__init__(path, mode="a", encoding="utf-8")
        self.setFormatter(_JsonLines(rank))
        self._first, self._printed = rank == 0, printed
        for fd in printed:  # or it would go on behind what was cut off
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._first and os.stat(self.baseFilename).st_size > LOG_BYTES:
                os.replace(self.baseFilename, f"{self.baseFilename}.1")
            super().emit(record)
        except OSError:
            self.handleError(record)
        finally:
            for fd in self._printed:
                _cut(fd)


def _cut(fd: int) -> None:
    """Leaves the newest half of what may lie in a file that is appended to."""
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_size <= LOG_BYTES:
        return
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        file.seek(-LOG_BYTES // 2, os.SEEK_END)
        newest = file.read()
    os.ftruncate(fd, 0)
    os.write(fd, newest)


def log_to_pool(run_dir: Path, rank: int) -> None:
    """Appends this process's log records to the pool's log, a JSON object a line."""
    handler = _PoolLog(run_dir / "pool.log", rank, (sys.stdout.fileno(), sys.stderr.fileno()))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def show_pulse(run_dir: Path, rank: int) -> None:
    """Has the pool see what this rank is at, see pulse.py, and have its stack when it asks for it."""
    stacks = open(run_dir / f"stack-{rank}", "w")  # noqa: SIM115 - for the process' life
    # Of all threads: of one process that was stopped, any thread may be the one that hears of a signal.
    faulthandler.register(STACK_SIGNAL, stacks, all_threads=True)
    pulse.start(run_dir / f"pulse-{rank}")


def record_failure(run_dir: Path, rank: int, error: BaseException) -> None:
    """Leaves why this rank ends, for the client to find: failure-<rank>.json."""
    text = type(error).__name__ + (f": {error}" if str(error) else "")
    own = not isinstance(error, RuntimeError) or str(error).startswith("CUDA error")  # also of a launch that timed out
    lost = not own and _PEER_LOST.search(str(error)) is not None
    record = {"rank": rank, "text": text, "peer_lost": lost, "time": time.time()}
    (run_dir / f"failure-{rank}.json").write_text(json.dumps(record), encoding="utf-8")
