"""Work that takes its time, while the other end goes on hearing of this one."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from ..pool.link import POLL_SECONDS

T = TypeVar("T")


def meanwhile(work: Callable[[], T], show: Callable[[], None]) -> T:
    """Gives what work() does, on a thread of its own, or raises it; until then show() is called now and then."""
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(work)
        while not wait([future], POLL_SECONDS).done:
            show()
        return future.result()
