"""A model file comes into the system's cache while workers start, where there is room for it."""

import ctypes
import mmap
import os

import pytest
from fake_workers import session

from fastusp_backend import read_ahead
from fastusp_backend.devices import ServerDevices
from fastusp_backend.pool import session as sessions

pytestmark = pytest.mark.unit

PIECES = 20


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file that the system has written to the disk and forgotten, of more pieces than there are readers, the last
    one short; skipped on systems that keep it."""
    monkeypatch.setattr(read_ahead, "PIECE", 1 << 20)
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as new:
        new.write(os.urandom((PIECES << 20) - 5))
        new.flush()
        os.fsync(new.fileno())
        os.posix_fadvise(new.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(path):
        pytest.skip("this file system keeps what is written in memory")
    return path


def cached(path) -> float:
    """Which part of a file's pages are in memory."""
    size = path.stat().st_size
    with open(path, "rb") as opened, mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        where = ctypes.c_char.from_buffer(mapped)
        try:
            mincore = ctypes.CDLL(None, use_errno=True).mincore
            mincore.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
            assert not mincore(ctypes.addressof(where), size, pages)
        finally:
            del where
        return sum(page & 1 for page in pages) / len(pages)


def test_all_of_a_file_is_read(file):
    read_ahead.read_ahead(str(file), lambda: True).join()
    assert cached(file) == 1


def test_it_ends_with_the_workers(file):
    read_ahead.read_ahead(str(file), lambda: False).join()
    assert cached(file) < 0.5


def test_a_file_whose_mount_passes_the_cache_by_is_left(file, monkeypatch):
    def is_not_there(*_):
        raise BlockingIOError

    monkeypatch.setattr(os, "preadv", is_not_there)
    read_ahead.read_ahead(str(file), lambda: True).join()
    assert cached(file) < 0.5


@pytest.mark.parametrize("free", [None, 1999])
def test_a_file_that_takes_more_than_half_of_free_memory_is_left(tmp_path, monkeypatch, free):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(1000))
    monkeypatch.setattr(read_ahead, "available", lambda: free)
    assert read_ahead.read_ahead(str(path), lambda: True) is None
    monkeypatch.setattr(read_ahead, "available", lambda: 2000)
    read_ahead.read_ahead(str(path), lambda: True).join()


def test_whoever_needs_a_file_that_is_gone_says_so(tmp_path):
    assert read_ahead.read_ahead(str(tmp_path / "none"), lambda: True) is None


def test_the_file_is_read_once_where_workers_begin_here(pool, monkeypatch):
    read = []
    monkeypatch.setattr(sessions, "read_ahead", lambda path, go_on: read.append((path, go_on())))
    one = session(pool)
    one.start()
    one.start()
    assert read == [(one.model.path, True)]
    pool.stop("it is enough")
    pool.devices = ServerDevices(ranks=1, address="a:1", key="", kind="cpu", per_machine=1, bfloat16=True)
    one.start()
    assert len(read) == 1 and pool.starts == 2
