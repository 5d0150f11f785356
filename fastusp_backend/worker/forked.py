"""Ranks as forks of torchrun's process, which has imported torch and all else that they run: to do so takes each rank
seconds of a processor.

torchrun starts, watches and ends them as it does processes of its own making: all that is another is how one begins.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

POLL_SECONDS = 0.02
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT)
"""Which torchrun handles."""


class Forked:
    """What torchrun asks of a `subprocess.Popen`. pid: the process's. returncode: as there, None while it runs."""

    def __init__(self, pid: int):
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None and (status := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(status[1])
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired after so many seconds."""
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(POLL_SECONDS)
        return self.returncode


def start_by_fork(work: Callable[[], NoReturn]) -> None:
    """Has torchrun fork its own process for each rank, which then does `work`, in place of the command that it was
    given."""

    def popen(handler: SubprocessHandler, _command: tuple, env: Mapping[str, str]) -> Forked:
        return fork(work, env, [stream and stream.fileno() for stream in (handler._stdout, handler._stderr)])

    SubprocessHandler._popen = popen


def fork(work: Callable[[], NoReturn], env: Mapping[str, str], output: list[int | None]) -> Forked:
    """Starts a process in a session of its own. env: its whole environment. output: descriptors in place of stdout and
    stderr; None leaves one."""
    sys.stdout.flush()
    sys.stderr.flush()
    hears, tells = os.pipe()
    # One that came before the new process has its own handlers would have it do what torchrun does at its end.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(tells)
        os.read(hears, 1)  # nothing comes: it ends when the session is there, which torchrun signals
        os.close(hears)
        return Forked(pid)
    try:
        os.setsid()
        os.close(tells)
        os.close(hears)
        for here, stream in zip(output, (1, 2), strict=True):
            if here is not None:
                os.dup2(here, stream)
        for number in _SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.environ.clear()
        os.environ.update(env)
        logging.root.handlers.clear()
        work()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)
