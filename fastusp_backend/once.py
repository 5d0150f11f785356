"""Answers that may take their time to come, or fail to: asked for once, failures included."""

import functools
import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from .errors import DeviceError

T = TypeVar("T")
SECONDS = 300.0
"""How long a failure counts: whoever has repaired a driver need not restart ComfyUI."""


class Once:
    """Calls ask() once a process and remembers its answer. A DeviceError is remembered for `SECONDS`, and raised again
    until then, with when it is asked again. One thread asks, others wait for it."""

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
                raise DeviceError(f"{self._failure[0]} ({ago:.0f} s ago; FastUSP asks again in {again} s)")
            if self._answer is None:
                try:
                    self._answer = (self._ask(),)
                except DeviceError as error:
                    self._failure = str(error), time.monotonic()
                    raise
            return self._answer[0]
