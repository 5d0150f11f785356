"""Answers of tools that may take their time, asked for once, and not waited for beyond that."""

import functools
import math
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from .errors import DeviceError

T = TypeVar("T")
SECONDS = 300.0
"""How long a failure counts: whoever has mended a driver need not restart ComfyUI."""


class Once:
    """ask(), asked once a process; where it raises DeviceError, once in `SECONDS`, and the same is raised until then,
    with when it is asked again. One thread asks, others wait for it."""

    def __init__(self, ask: Callable[[], T]):
        functools.update_wrapper(self, ask)
        self._ask = ask
        self._lock = threading.Lock()
        self.cache_clear()

    def cache_clear(self) -> None:
        self._answer: tuple[T] | None = None
        self._failure: tuple[str, float] | None = None

    def __call__(self) -> T:
        with self._lock:
            if self._failure is not None and (ago := time.monotonic() - self._failure[1]) < SECONDS:
                again = math.ceil(SECONDS - ago)
                raise DeviceError(f"{self._failure[0]} (asked {ago:.0f} s ago; it is asked again in {again} s)")
            if self._answer is None:
                try:
                    self._answer = (self._ask(),)
                except DeviceError as error:
                    self._failure = str(error), time.monotonic()
                    raise
            return self._answer[0]


def run(
    command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with its output captured; but one that takes longer is not waited for when it was killed: a
    driver that hangs may hold it for ever. Raises OSError or subprocess.TimeoutExpired."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
