"""Host memory that is pinned for GPUs."""

import ctypes
import mmap

import pytest

from fastusp_backend.comm import mapped

pytestmark = pytest.mark.unit

PAGES = 64


def resident(memory):
    """How many of its pages are there (mincore(2))."""
    found = (ctypes.c_ubyte * PAGES)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes), found) == 0
    return sum(page & 1 for page in found)


def test_pages_are_there_before_they_are_pinned(monkeypatch):
    """Whoever pins makes those that are not one by one: 8.6 GB took 6 s."""
    (memory,) = mapped.map_memory_of_all(PAGES * mmap.PAGESIZE, None)
    assert resident(memory) == 0
    seen = []
    monkeypatch.setattr(mapped, "pin", lambda tensor: seen.append(resident(tensor)) or 0)
    assert mapped.pin_all([memory], None) == [memory.data_ptr()]
    assert seen == [PAGES] and not memory.any()
