"""A time limit for what a pool is asked."""

import contextlib
import time
from collections.abc import Callable, Iterator

from ..pool import Pool


class _Late(Exception):
    pass


@contextlib.contextmanager
def limit(pool: Pool, seconds: float) -> Iterator[Callable[[], bool]]:
    """Yields what `Progress.interrupted` takes. Requests that do not end in time end the workers: a PoolError then
    shows their last log lines."""
    began = time.monotonic()

    def interrupted() -> bool:
        if time.monotonic() - began > seconds:
            raise _Late
        return False

    try:
        yield interrupted
    except _Late:
        raise pool.abandon(f"gave no result within {seconds:g} s") from None
