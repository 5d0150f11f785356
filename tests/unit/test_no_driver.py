"""Where CUDA's driver library is not found, memory is not pinned, and that is said; nothing is raised."""

from types import SimpleNamespace

import pytest
import torch

from fastusp_backend import pinning

pytestmark = pytest.mark.unit


def test_a_driver_that_cannot_be_loaded(monkeypatch, caplog):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pinning.ctypes, "CDLL", missing)
    monkeypatch.setattr(pinning.torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    pinning.driver.cache_clear()
    assert pinning.pin(torch.ones(3)) == pinning.NO_DRIVER
    assert "libcuda.so.1: cannot open" in caplog.text
