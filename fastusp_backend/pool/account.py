"""What people want to know of a pool beside its processes: whether somebody samples with it, what went wrong last."""

import contextlib
import threading
from collections.abc import Iterator

from ..errors import Cancelled, FastUSPError


class Account:
    """How one pool's requests fare. error: the text of what the last one to fail raised, until one succeeds."""

    def __init__(self):
        self.error: str | None = None
        self._lock = threading.Lock()
        self._runs = 0

    @property
    def sampling(self) -> bool:
        """Whether a sampling run is under way, though no request of it may run."""
        return self._runs > 0

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """A sampling run, from its beginning to its end or failure, as `request` accounts for it. Runs may lie in each
        other."""
        with self._lock:
            self._runs += 1
        try:
            with self.request():
                yield
        finally:
            with self._lock:
                self._runs -= 1

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """A request, or an order to idle workers. What its client wanted so is no error."""
        try:
            yield
        except Cancelled:
            raise
        except FastUSPError as error:
            self.error = str(error)
            raise
