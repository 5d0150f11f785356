"""A model file is read into the system's cache while workers start: they import torch for seconds, in which a disk
would stand still."""

import logging
import os
import threading
from collections.abc import Callable

from .host_memory import available

log = logging.getLogger(__name__)

PIECE = 8 << 20
"""Bytes that a thread reads at once."""
READERS = 4
"""Threads, each with a descriptor of its own, by which the kernel predicts what is read next. From a disk that gives
one 1.9 GB/s they get 2.4."""
SHARE = 0.5
"""Of free memory, that a file may take of the cache: other models are loaded as well."""


def read_ahead(path: str, go_on: Callable[[], bool]) -> threading.Thread | None:
    """Starts reading a file and returns the thread at once, which ends early where go_on() is false. Nothing is read,
    and None returned, where the file is larger than `SHARE` of free memory, or where the system does not tell that.

    A file that cannot be read is left to whoever needs it.
    """
    try:
        size = os.stat(path).st_size
    except OSError as error:
        log.info("%s is not read ahead: %s", path, error)
        return None
    free = available()
    if free is None or size > SHARE * free:
        log.info("%s is not read ahead: that leaves too little of free memory", path)
        return None
    thread = threading.Thread(target=_read_all, args=(path, size, go_on), daemon=True)
    thread.start()
    return thread


def _read_all(path: str, size: int, go_on: Callable[[], bool]) -> None:
    if not _stays(path):
        log.info("%s is not read ahead: its file system does not say that the cache keeps it", path)
        return
    args = path, size, go_on
    threads = [threading.Thread(target=_read, args=(*args, first), daemon=True) for first in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _stays(path: str) -> bool:
    """Whether what was read of a file is in the cache then. Some mounts pass it by, of FUSE and 9p for example: all
    would be read twice."""
    try:
        with open(path, "rb", buffering=0) as file:
            os.pread(file.fileno(), 1, 0)
            return os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
    except OSError:  # it is not there, or the file system cannot tell
        return False


def _read(path: str, size: int, go_on: Callable[[], bool], first: int) -> None:
    """Reads every `READERS`-th piece, beginning with number `first`. Sent to nowhere, nothing of it is copied."""
    try:
        with open(path, "rb", buffering=0) as file, open(os.devnull, "wb", buffering=0) as nowhere:
            for start in range(first * PIECE, size, READERS * PIECE):
                if not go_on():
                    return
                os.sendfile(nowhere.fileno(), file.fileno(), start, PIECE)
    except OSError as error:
        log.info("%s is not read ahead to its end: %s", path, error)
