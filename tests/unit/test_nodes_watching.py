"""What is sent to pages that look: to which of them, how often, and until when."""

import asyncio
import sys
from types import SimpleNamespace

import pytest

from fastusp_backend.errors import DeviceError

pytestmark = pytest.mark.unit


class Pool:
    def __init__(self, *gpus: int):
        self.devices, self.lines = SimpleNamespace(gpus=gpus), ["first", "second"]

    def log_since(self, number: int) -> tuple[list[str], int]:
        return self.lines[number if number <= len(self.lines) else 0 :], len(self.lines)


@pytest.fixture
def watching(node_module, monkeypatch):
    """The module; `sent`: (event, data, client) in order. `open` is a page with the panel, `reader` one with a log."""
    sent, pools = [], {"0": Pool(0), "cpu:2": Pool()}
    server = SimpleNamespace(sockets={"open", "reader"}, send_sync=lambda *event: sent.append(event))
    monkeypatch.setitem(sys.modules, "aiohttp", SimpleNamespace(web=SimpleNamespace(Request=object, Response=object)))
    module = node_module(
        "watching",
        comfyui={"PromptServer": SimpleNamespace(instance=server)},
        answers=dict.fromkeys(("FOREIGN", "foreign", "refused")),
        pools={"all_pools": lambda: [*pools.values()], "pool_named": pools.get},
        status={"push_changes": lambda: sent.append(("changes",))},
    )
    monkeypatch.setattr(module, "gpu_loads", lambda: [{"index": 0}])
    module.sent, module.known, module.sockets = sent, pools, server.sockets
    module._watches["open"] = module.Watch("open", panel=True)
    module._watches["reader"] = module.Watch("reader", log=module.Log("cpu:2"))
    return module


def test_the_panel_is_sent_what_gpus_do(watching, monkeypatch):
    asyncio.run(watching._loads())
    assert watching.sent == [("fastusp.loads", {"gpus": [{"index": 0}]}, "open")]

    def fail():
        raise DeviceError("no driver")

    monkeypatch.setattr(watching, "gpu_loads", fail)
    asyncio.run(watching._loads())
    assert watching.sent[1:] == [("fastusp.loads", {"gpus": []}, "open")]


def test_no_driver_is_asked_where_nobody_wants_it(watching, monkeypatch):
    monkeypatch.setattr(watching, "gpu_loads", lambda: pytest.fail("asked"))
    del watching.known["0"]
    asyncio.run(watching._loads())
    watching.known["0"] = Pool(0)
    del watching._watches["open"]
    asyncio.run(watching._loads())
    assert watching.sent == []


def test_each_line_of_a_log_is_sent_once(watching):
    asyncio.run(watching._changes())
    watching.known["cpu:2"].lines.append("third")
    asyncio.run(watching._changes())
    asyncio.run(watching._changes())
    logs = [event[1:] for event in watching.sent if event[0] == "fastusp.log"]
    assert logs == [
        ({"devices": "cpu:2", "asked": 0, "from": 0, "next": 2, "lines": ["first", "second"]}, "reader"),
        ({"devices": "cpu:2", "asked": 2, "from": 2, "next": 3, "lines": ["third"]}, "reader"),
    ]
    assert watching.sent.count(("changes",)) == 3


def test_it_ends_with_the_last_page(watching):
    looks = []

    async def look():
        looks.append({*watching._watches})
        watching.sockets.discard("open" if len(looks) == 1 else "reader")

    asyncio.run(asyncio.wait_for(watching._repeat(look, 0), 5))
    assert looks == [{"open", "reader"}, {"reader"}] and not watching._watches


def test_a_look_that_fails_is_not_the_last(watching, caplog):
    looks = []

    async def look():
        looks.append(len(looks))
        if len(looks) < 3:
            raise ValueError("a line that is none")
        watching.sockets.clear()

    asyncio.run(watching._repeat(look, 0))
    assert looks == [0, 1, 2] and caplog.text.count("ValueError: a line that is none") == 1
