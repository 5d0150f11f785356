"""How long evaluations of one shape take, so that one which takes far longer is noticed.

Before each evaluation a rank shows (pulse.py) by when it will have done something next: some times what the longest of
the last ones took. A fixed limit would either take a large image on a slow device for hung, or let a small one hang for
as long. The times of GPUs come from events around the work, which are asked when they have passed: nothing waits.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch

from ..pulse import COLD_CPU_SECONDS, COLD_SECONDS

SHORTEST_SECONDS = 12.0
TIMES_LONGER = 4
"""An evaluation may take this many times as long as the longest of the last ones: other programs may take the
processors, or heat slows them."""
_LAST_ONES = 8


class Pace:
    """The times that one `Evaluation`'s runs on `device` took."""

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds: deque[float] = deque(maxlen=_LAST_ONES)
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def unknown(self) -> float:
        """Seconds that are allowed where nothing is known: for compiling, capturing, and computing one block."""
        return COLD_CPU_SECONDS if self._device.type == "cpu" else COLD_SECONDS

    @property
    def limit(self) -> float:
        """Seconds after which an evaluation that has not ended is taken for hung."""
        if not self._seconds:
            return self.unknown
        return max(SHORTEST_SECONDS, TIMES_LONGER * max(self._seconds))

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Takes the time of an evaluation which neither compiles nor captures. A GPU's is known when it has ended."""
        if self._device.type == "cpu":
            began = time.perf_counter()
            yield
            self._seconds.append(time.perf_counter() - began)
            return
        while self._running and self._running[0][1].query():
            began, ended = self._running.popleft()
            self._seconds.append(began.elapsed_time(ended) / 1000)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        yield
        ended.record()
        self._running.append((began, ended))
