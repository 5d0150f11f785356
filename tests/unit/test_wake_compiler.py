"""A worker wakes the compiler before anything is asked of it; where that fails, it says so and goes on."""

import logging

import pytest

from fastusp_backend.worker import rank

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "error, text",
    [
        (None, "the compiler is there after 0.0 s"),
        (PermissionError("no cache"), "torch.compile does not work here: PermissionError: no cache"),
    ],
)
def test_what_the_log_says(monkeypatch, caplog, error, text):
    def wake(_device):
        if error:
            raise error

    monkeypatch.setattr(rank, "wake_compiler", wake)
    with caplog.at_level(logging.INFO):
        rank._wake_compiler(None)
    assert text in caplog.text
