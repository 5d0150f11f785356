"""A rank's libraries are there before its first evaluation; nothing is left of it but them."""

import logging

import pytest
import torch
from test_pool import spec  # noqa: F401 - a fixture

from fastusp_backend.engine import Engine, Warming

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def reserved_with(engine: Engine, spec) -> int:  # noqa: F811
    engine.describe(spec)
    engine.make_room()
    engine.load()
    taken = torch.cuda.memory_reserved()
    engine.release()
    return taken


def test_it_succeeds_and_its_memory_is_given_back(spec, caplog):  # noqa: F811
    device = torch.device("cuda", 0)
    cold = reserved_with(Engine(device), spec)
    with caplog.at_level(logging.INFO):
        begun = Warming(device)
        begun.wait()
    assert "failed" not in caplog.text
    assert reserved_with(Engine(device, begun), spec) == cold
