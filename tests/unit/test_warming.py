"""What the first evaluation needs is begun before, hinders nothing where it fails, and has ended when one comes."""

import logging
import threading

import pytest
import torch
from support import SMALL, spec_of

from fastusp_backend.engine import Engine, Warming, warming
from fastusp_backend.models.synthetic import write_checkpoint

pytestmark = pytest.mark.unit


def test_what_fails_is_logged_and_the_rest_is_done(monkeypatch, caplog):
    done = []

    def fails(device):
        raise RuntimeError("no such library")

    monkeypatch.setattr(torch.cuda, "device", lambda _: threading.Lock())
    for name, part in {"_attention": fails, "_product": done.append, "_kernel": done.append}.items():
        monkeypatch.setattr(warming, name, part)
    device = torch.device("cuda", 1)
    with caplog.at_level(logging.INFO):
        Warming(device).wait()
    assert done == [device, device] and "no such library" in caplog.text


def test_a_model_that_is_loaded_finds_it_done(tmp_path):
    """Once: what it took is freed then."""
    write_checkpoint(str(tmp_path / "model.safetensors"), SMALL)
    waited = []

    class Begun:
        def wait(self):
            waited.append(engine.spec)

    engine = Engine(torch.device("cpu"), Begun())
    for _ in range(2):
        engine.describe(spec_of(tmp_path / "model.safetensors"))
        engine.make_room()
        engine.load()
        engine.release()
    assert waited == [None]
