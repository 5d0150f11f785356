"""Measure here: what the page is told of rows, what the devices are meanwhile, and how it is interrupted."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch

import fastusp_backend.cli.bench
import fastusp_backend.cli.verify  # noqa: F401 - the node takes them as parts of its own package
from fastusp_backend.cli.bench import Bench, Row
from fastusp_backend.config import Layout, Settings
from fastusp_backend.devices import Devices, ServerDevices
from fastusp_backend.errors import PoolError

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]


class Server:
    def __init__(self):
        self.client_id, self.sent = "page", []
        self.instance = self

    def send_sync(self, event, data, client):
        self.sent.append((event, data, client))


@pytest.fixture
def measuring(node_module):
    """The node's module; `sent`: what the page was told; `pools`: those of ComfyUI; `stopped`: whether Stop was
    pressed; `shown`: the node's texts."""
    server, shown, pools, stop = Server(), [], [], []
    management = SimpleNamespace(
        processing_interrupted=lambda: bool(stop),
        unload_all_models=lambda: shown.append("unloaded"),
        soft_empty_cache=lambda: None,
    )
    module = node_module(
        "measuring",
        comfyui={
            "ProgressBar": lambda total: SimpleNamespace(update_absolute=lambda value: None),
            "PromptServer": server,
            "dev_only": dict,
            "get_executing_context": lambda: SimpleNamespace(node_id="7", prompt_id="p"),
            "io": SimpleNamespace(ComfyNode=object, Schema=None, NodeOutput=SimpleNamespace),
            "model_management": management,
        },
        files={"model_names": None},
        host={"interruptible": None},
        loader={"STORAGE": {}, "read_named": None, "spec_on": None},
        pools={"all_pools": lambda: pools},
        servers={"own_devices": None},
        settings={"SettingsType": None},
        status={
            "PUSH_SECONDS": 0.2,
            "node_run": None,
            "show": shown.append,
            "workflow_id": lambda png: png["workflow"]["id"],
        },
    )
    module.sent, module.pools, module.stop, module.shown = server.sent, pools, stop, shown
    return module


def row(ranks, ms, ring=1, automatic=True, **settings):
    layout = Layout(ulysses=ranks // ring, ring=ring)
    return Row(layout=layout, settings=Settings(**settings), seconds=ms and ms / 1000, automatic=automatic)


TWO = Devices(ranks=2, gpus=(3, 5))


def told_of(measuring, *rows, gpus="auto", devices=TWO):
    told = measuring.Told(gpus, devices, "w")
    told.expect(100)
    for one in rows:
        told.add(one)
    return told


def test_what_is_to_be_set_for_a_row(measuring):
    """What the user wrote where that means the same; degrees alone where FastUSP takes others by itself."""
    told = told_of(measuring, row(1, 100), row(2, 60), row(2, 50, ring=2, automatic=False), row(2, 40, wire="int8"))
    table = told.table()
    assert [one["values"] for one in table["rows"]] == [
        {"gpus": "3", "ulysses": 0, "ring": 0},
        {"gpus": "auto", "ulysses": 0, "ring": 0},
        {"gpus": "auto", "ulysses": 1, "ring": 2},
        {"gpus": "auto", "ulysses": 0, "ring": 0},
    ]
    assert (table["best"], table["quickest"]) == (2, 3) and len(table["said"]) == 2
    assert [one["gain"] for one in table["rows"]] == [1, pytest.approx(5 / 3), 2, 2.5]
    told.show_result()
    assert measuring.shown == ["measured; ulysses 1 x ring 2 takes 50.0 ms a step"]
    ranks = told_of(measuring, row(1, 9), gpus="cpu:2", devices=Devices(ranks=2)).table()
    assert ranks["rows"][0]["values"]["gpus"] == "cpu:1" and ranks["quickest"] is None


def test_what_did_not_run(measuring):
    refused = Row(layout=Layout(ulysses=1, ring=1), settings=Settings(), problem="rank 0 ran out of memory\nmore")
    told = told_of(measuring, refused)
    table = told.table()
    (one,) = table["rows"]
    assert (one["ms"], one["gain"], one["problem"]) == (None, None, "rank 0 ran out of memory")
    assert (table["best"], table["quickest"]) == (None, None)
    told.show_result()
    assert measuring.shown == ["nothing could be measured"]


def test_the_page_is_told_meanwhile(measuring, monkeypatch):
    told = told_of(measuring)
    monkeypatch.setattr(measuring, "PUSH_SECONDS", math.inf)
    with told.watch("two ranks", 3) as progress:
        progress.phase("loading the model")
        progress.step(None, {})
        assert not progress.interrupted()
        measuring.stop.append(True)
        assert progress.interrupted()
    told.add(row(1, 100))
    assert [(event, data["workflow"], data["node"], data["prompt"], to) for event, data, to in measuring.sent] == [
        ("fastusp.measuring", "w", "7", "p", "page")
    ] * 2, "steps come often, and are left out"
    assert measuring.sent[0][1]["doing"] == "two ranks: loading the model"
    assert measuring.sent[1][1]["done"] == 3, "of a run that was given up, too"
    measuring.PromptServer.client_id = None
    told.add(row(2, 50))
    assert len(measuring.sent) == 2, "nobody has queued it from a page"


def test_what_8_bits_change(measuring, monkeypatch):
    told = told_of(measuring, row(1, 100), row(2, 60), row(2, 50, wire="int8"), row(2, 55, linear="fp8"))
    asked = []

    def attempt(session, given, steps, name, watch):
        assert session.pool.crowded
        asked.append((str(session.layouts[0]), session.settings.wire, session.settings.linear))
        if session.settings.linear == "fp8":
            return "rank 0 ran out of memory\nmore"
        return [torch.full((2,), 1.0 + 0.01 * (session.settings.wire == "int8") * n) for n in (1, 3, 2, 4)]

    monkeypatch.setattr(measuring.verify, "attempt", attempt)
    plan = Bench(spec=None, given=(None, None), steps=1, base=Settings(wire="fp8"), crowded=True)
    told.compare(plan, 1.0)
    layout = "ulysses 2 x ring 1"
    assert asked == [(layout, "exact", "exact"), (layout, "int8", "exact"), (layout, "exact", "fp8")]
    changes = [one["changes"] for one in told.table()["rows"]]
    assert changes[:2] == [None, None] and changes[3] == {"problem": "rank 0 ran out of memory"}
    assert changes[2] == {"evaluation": pytest.approx(0.03), "latents": pytest.approx(0.04)}


def test_workers_leave_and_come_again(measuring):
    """Those that ran; also after an error. They are gone before ComfyUI has models make room: theirs would move for
    nothing."""
    done = measuring.shown

    def pool(name, state, devices):
        def start():
            done.append(f"{name}: start")
            if name == "lost":
                raise PoolError("no memory")

        return SimpleNamespace(
            status=lambda: {"state": state},
            stop=lambda why: measuring.shown.append(f"{name}: stop, {why}"),
            start=start,
            devices=devices,
        )

    here = Devices(ranks=2)
    server = ServerDevices(ranks=2, address="b:1", key="", kind="cpu", per_machine=2, bfloat16=True)
    measuring.pools += [pool("warm", "idle", here), pool("cold", "off", here)]
    measuring.pools += [pool("server", "idle", server), pool("lost", "idle", here)]
    with pytest.raises(ValueError), measuring._devices_to_itself():
        done.append("measuring")
        raise ValueError
    stops = [f"{name}: stop, their devices are measured" for name in ("warm", "lost")]
    assert done == [*stops, "unloaded", "measuring", "lost: start", "warm: start"]


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        (None, Settings()),
        (Settings(cache="easy", overlap=False), Settings(overlap=False)),
        (Settings(cache="first_block", wire="int8"), Settings(wire="int8")),
    ],
    ids=["none", "easy", "first_block"],
)
@pytest.mark.parametrize("crowded", [(), (TWO,), (Devices(ranks=1, gpus=(3,)),)], ids=["none", "these", "others"])
def test_what_is_measured_is_what_the_prompt_would_run(measuring, monkeypatch, settings, base, crowded):
    """Packed files as a pool that had to give up room has them; no step is skipped, which would have no time."""
    made = []

    class Plan:
        watch = None

        def __init__(self, **what):
            made.append(what)

        def count(self, devices, heads):
            return 3

        def rows(self, devices, heads):
            yield row(1, 100)

    file = SimpleNamespace(config=SimpleNamespace(heads=4, timestep_scale=1.0))
    monkeypatch.setattr(measuring.bench, "Bench", Plan)
    monkeypatch.setattr(measuring, "read_named", lambda name: file)
    monkeypatch.setattr(measuring, "own_devices", lambda gpus: TWO)
    monkeypatch.setattr(measuring, "spec_on", lambda *what: what[1:])
    monkeypatch.setattr(measuring, "random_inputs", lambda *what: what[1:])
    for name in ("node_run", "interruptible"):
        monkeypatch.setattr(measuring, name, lambda *_: contextlib.nullcontext())
    for devices in (TWO, Devices(ranks=1, gpus=(3,))):
        pool = SimpleNamespace(devices=devices, crowded=devices in crowded, status=lambda: {"state": "off"})
        measuring.pools.append(pool)
    hidden = SimpleNamespace(extra_pnginfo={"workflow": {"id": "w"}})
    monkeypatch.setattr(measuring.USPMeasure, "hidden", hidden, raising=False)  # ComfyUI sets it
    told = measuring.USPMeasure.execute("dev.safetensors", "default", "3,5", 640, 480, 5, True, False, settings)
    (what,) = made
    assert what["base"] == base and what["crowded"] == (TWO in crowded)
    assert what["given"] == ((640, 480), measuring.TEXT) and what["spec"] == (file, "default")
    assert (what["steps"], what["every_layout"]) == (5, True)
    assert told.ui["fastusp"][0]["rows"][0]["ms"] == 100.0
    assert {event["workflow"] for _, event, _ in measuring.sent} == {"w"}
