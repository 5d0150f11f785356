"""What the page may do with a pool, and who else may not."""

import sys
from types import SimpleNamespace

import pytest

from fastusp_backend.errors import FastUSPError

pytestmark = pytest.mark.unit


class Pool:
    devices = "cpu:2"

    def __init__(self, state: str):
        self.state, self.done = state, []

    def status(self):
        return {"state": self.state}

    def release(self):
        self.done.append("release")

    def stop(self, why):
        self.done.append(f"stop: {why}")

    def start(self):
        self.done.append("start")


@pytest.fixture
def answers(node_module, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", SimpleNamespace(web=SimpleNamespace(Request=object, Response=object)))
    return node_module("answers")


@pytest.fixture
def control(node_module, answers):
    neighbours = {"pools": {"pool_named": None}, "report": {"report": None}, "status": {"push_pools": None}}
    neighbours["answers"] = dict.fromkeys(("FOREIGN", "foreign", "refused"))
    return node_module("control", comfyui={"PromptServer": None}, **neighbours)


def test_actions(control):
    pool = Pool("idle")
    for action in control.ACTIONS.values():
        action(pool)
    stopped = "stop: they were stopped from the page"
    assert pool.done == ["release", stopped, stopped, "start"]


@pytest.mark.parametrize("state", ["busy", "stopping"])
def test_nothing_is_released_in_a_run(control, state):
    pool = Pool(state)
    with pytest.raises(FastUSPError, match="Stop the run first: the pool on cpu:2"):
        control.ACTIONS["release"](pool)
    assert not pool.done
    control.ACTIONS["stop"](pool)  # which is for workers that answer nothing else
    assert pool.done


@pytest.mark.parametrize(
    ("origin", "fetched", "allowed"),
    [
        ("http://127.0.0.1:8188", "same-origin", True),
        ("https://comfy.example", "same-origin", True),  # a proxy's name
        ("http://evil.example", "cross-site", False),
        (None, None, True),  # no browser
        ("http://127.0.0.1:8188", None, True),
        ("http://evil.example", None, False),
        ("http://127.0.0.1:9999", None, False),
        ("null", None, False),
        ("http://127.0.0.1:8188", "cross-site", False),
        (None, "cross-site", False),
        ("http://127.0.0.1:8188", "same-site", False),
    ],
)
def test_other_sites_are_refused(answers, origin, fetched, allowed):
    assert answers.same_site(origin, fetched, "127.0.0.1:8188") == allowed
