"""A model file that is read into the system's cache while workers start: they import torch for seconds, in which a disk
would stand still."""

import logging
import os
import threading

from .host_memory import available

log = logging.getLogger(__name__)

PIECE = 8 << 20
"""Bytes that a thread reads at once."""
READERS = 8
"""Threads, each with a descriptor of its own: by it the system tells what will be read next."""


def read_ahead(path: str) -> list[threading.Thread]:
    """Begins, without waiting: returns the threads that read. None where the file would not fit into free memory, or
    the system does not say how much that is: what was read first would be gone when it is needed.

    A file that cannot be read is left to whoever needs it.
    """
    try:
        size = os.stat(path).st_size
    except OSError as error:
        log.info("not read ahead: %s", error)
        return []
    free = available()
    if free is None or size > free:
        return []
    threads = [threading.Thread(target=_read, args=(path, size, first), daemon=True) for first in range(READERS)]
    for thread in threads:
        thread.start()
    return threads


def _read(path: str, size: int, first: int) -> None:
    """Reads every so-manieth piece, from the `first` one on. Sent to nowhere, nothing of it is copied."""
    try:
        with open(path, "rb", buffering=0) as file, open(os.devnull, "wb", buffering=0) as nowhere:
            for start in range(first * PIECE, size, READERS * PIECE):
                os.sendfile(nowhere.fileno(), file.fileno(), start, PIECE)
    except OSError as error:
        log.info("%s is not read ahead: %s", path, error)
