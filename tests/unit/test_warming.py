"""What the first evaluation needs is begun before, hinders nothing where it fails, and has ended when memory is
counted."""

import logging
import threading

import pytest
import torch
from support import SMALL, spec_of

from fastusp_backend.engine import Engine, Warming, warming
from fastusp_backend.engine import engine as engine_module
from fastusp_backend.models.synthetic import write_checkpoint

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("capability", "parts"), [((9, 0), 2), ((8, 9), 2), ((7, 5), 0)])
def test_what_fails_is_logged_and_the_rest_is_done(monkeypatch, caplog, capability, parts):
    done = []

    def fails(device):
        raise RuntimeError("no such library")

    monkeypatch.setattr(torch.cuda, "device", lambda _: threading.RLock())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    for name, part in {"_attention": fails, "_product": done.append, "_kernel": done.append}.items():
        monkeypatch.setattr(warming, name, part)
    device = torch.device("cuda", 1)
    with caplog.at_level(logging.INFO):
        Warming(device).wait()
    assert done == [device] * parts
    assert ("no such library" in caplog.text) == (capability == (9, 0))


def test_memory_is_counted_when_it_has_ended(tmp_path, monkeypatch):
    """And freed: libraries are given some while they start."""
    write_checkpoint(str(tmp_path / "model.safetensors"), SMALL)
    order = []

    class Begun:
        def wait(self):
            order.append("ended")

    measure = engine_module.measure_room
    monkeypatch.setattr(engine_module, "measure_room", lambda device: order.append("counted") or measure(device))
    engine = Engine(torch.device("cpu"), Begun())
    for _ in range(2):
        engine.describe(spec_of(tmp_path / "model.safetensors"))
        engine.make_room()
        engine.load()
        engine.release()
    assert order == ["ended", "counted", "counted"]
