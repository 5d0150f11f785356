"""USP Loader's warning that fewer GPUs are predicted to be faster, and where it says nothing."""

import logging
from types import SimpleNamespace

import msgspec
import pytest
import torch
from placing import header, spec_with

import fastusp_backend.models.prediction  # noqa: F401 - the node takes it as a part of its own package
from fastusp_backend.config import Settings
from fastusp_backend.devices import Devices, GpuState, ServerDevices
from fastusp_backend.errors import DeviceError
from fastusp_backend.models.synthetic import FLUX_DEV, QWEN_IMAGE, TINY_FLUX
from fastusp_backend.planner import plan_batches

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]

H100, RTX_4090 = "NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090"
BYTES = {H100: 80 << 30, RTX_4090: 24 << 30}


@pytest.fixture
def node(node_module, monkeypatch):
    """node(gpus, name, pcie, word) is the module where NVML tells of so many GPUs."""
    module = node_module("fewer_gpus")

    def make(count=2, *, name=H100, pcie=(4, 8), word="SYS", **changed):
        gpus = tuple(SimpleNamespace(index=n, name=name) for n in range(count))
        usual = {"free": None, "compute_mode": "Default", "mig": False, "driver": "580"}
        states = tuple(
            GpuState(**{"index": n, "total": BYTES.get(name, 16 << 30), "pcie": pcie} | usual | changed)
            for n in range(count)
        )
        words = {f"{i}-{j}": word for i in range(count) for j in range(i + 1, count) if word}
        monkeypatch.setattr(module, "list_gpus", lambda: gpus)
        monkeypatch.setattr(module, "gpu_states", lambda: states)
        monkeypatch.setattr(module, "gpu_links", lambda: words)
        return module

    return make


def session_on(gpus, config=FLUX_DEV, *, dtype=torch.bfloat16, batch_parallel="auto", ring=0, **settings):
    """A session of USP Loader's and its file."""
    settings = Settings(**settings)
    devices = Devices(ranks=len(gpus), gpus=gpus) if isinstance(gpus, tuple) else Devices(ranks=gpus)
    spec = msgspec.structs.replace(spec_with(settings.weights), linear=settings.linear)
    layouts = plan_batches(devices.ranks, config.heads, ring=ring, batch_parallel=batch_parallel)
    session = SimpleNamespace(pool=SimpleNamespace(devices=devices), spec=spec, settings=settings, layouts=layouts)
    return session, SimpleNamespace(header=header(config, dtype), config=config)


def test_what_nobody_notices_is_not_told(node, caplog):
    """Two GPUs over PCIe take longer for a model to try things with, too."""
    module = node(2)
    assert module.faster_with_fewer(*session_on((0, 1))) is not None
    caplog.clear()
    assert module.faster_with_fewer(*session_on((0, 1), TINY_FLUX)) is None and not caplog.records


def test_the_remedy_comes_first_and_once(node, caplog):
    module = node()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert module.faster_with_fewer(*session_on((1, 0))) == Devices(ranks=1, gpus=(1,))
    assert len(caplog.records) == 1
    said = caplog.records[0].getMessage()
    assert said.startswith("FastUSP: Set gpus to 1 in USP Loader: a step of FLUX.1 at 1024 x 1024 and cfg 1 is")
    assert "to take 120 ms there, and 206 ms on gpu 1,0 over PCIe 4 x8; wire = auto" in said


def test_who_sends_8_bits_is_not_told_to(node, caplog):
    with caplog.at_level(logging.WARNING):
        node(pcie=(4, 4)).faster_with_fewer(*session_on((0, 1), wire="int8"))
    said = caplog.records[0].getMessage()
    assert "and 206 ms on gpu 0,1 over PCIe 4 x4. bench" in said and "wire" not in said


def test_a_ring_of_five_sends_more_than_four_gpus_do(node):
    found = node(5, name=RTX_4090).faster_with_fewer(*session_on((0, 1, 2, 3, 4), dtype=torch.float8_e4m3fn))
    assert found == Devices(ranks=4, gpus=(0, 1, 2, 3))


def test_peer_access_that_is_switched_off(node, monkeypatch):
    session, file = session_on((0, 1))
    assert node(word="NV18").faster_with_fewer(session, file) is None
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert node(word="NV18").faster_with_fewer(session, file) is not None


def test_models_that_are_guided_by_two_prompts_take_them_side_by_side(node):
    assert node().faster_with_fewer(*session_on((0, 1), QWEN_IMAGE)) is None
    assert node().faster_with_fewer(*session_on((0, 1), QWEN_IMAGE, batch_parallel="off")) is not None


@pytest.mark.parametrize(
    ("machine", "given"),
    [
        ({"pcie": (5, 16)}, {}),  # two are faster
        ({"pcie": None}, {}),  # as if it were that
        ({"word": ""}, {}),
        ({"name": "Tesla T4"}, {}),
        ({"total": None}, {}),
        ({"mig": True}, {}),
        ({}, {"ring": 2}),
        ({"total": 30 << 30}, {}),  # weights of 24 GB
        ({}, {"weights": "host"}),
        ({"count": 1}, {"gpus": (0,)}),
        ({"count": 0}, {"gpus": 2}),
    ],
    ids=[
        "fast",
        "width untold",
        "link untold",
        "unknown card",
        "memory untold",
        "parts",
        "own degrees",
        "no room",
        "host",
        "one GPU",
        "CPU",
    ],
)
def test_silent_otherwise(node, caplog, machine, given):
    with caplog.at_level(logging.WARNING):
        assert node(**machine).faster_with_fewer(*session_on(**{"gpus": (0, 1)} | given)) is None
    assert not caplog.records


def test_silent_where_nvml_fails(node, monkeypatch, caplog):
    module = node()

    def fails():
        raise DeviceError("no answer")

    monkeypatch.setattr(module, "gpu_links", fails)
    assert module.faster_with_fewer(*session_on((0, 1))) is None and not caplog.records


def test_what_nvml_tells(nvml, node_module):
    """By the processes that are asked in truth."""
    gpu = {"name": H100, "pcie": [4, 8]}
    nvml({**gpu, "ancestors": {"1": 50}}, gpu)
    module = node_module("fewer_gpus")
    assert module.faster_with_fewer(*session_on((0, 1))) == Devices(ranks=1, gpus=(0,))


@pytest.fixture
def loader(node_module, monkeypatch):
    """loader(fewer, sage) is USP Loader's module on two GPUs, and the list of what it does and shows."""

    def make(fewer=None, sage=False):
        order, devices = [], Devices(ranks=2, gpus=(0, 1))
        nodes = {
            "comfyui": {
                "command_line": SimpleNamespace(use_sage_attention=sage),
                "advanced": None,
                "search_aliases": None,
                "io": SimpleNamespace(ComfyNode=object, Schema=None, NodeOutput=list),
            },
            "files": {"model_names": None, "model_path": None},
            "fewer_gpus": {"faster_with_fewer": lambda session, file: order.append("asked") or fewer},
            "machines": {"warn_if_slower": node_module("machines").warn_if_slower},
            "pools": {"pool_for": lambda devices: None},
            "remote_model": {"remote_model": lambda session, header: []},
            "servers": {"devices_of": lambda _: devices, "served": None},
            "settings": {"SettingsType": None},
            "status": {"node_run": None, "show": order.append},
        }
        module = node_module("loader", **nodes)
        file = SimpleNamespace(
            header=header(FLUX_DEV), config=FLUX_DEV, spec=lambda **types: spec_with("auto"), log_ignored=lambda: None
        )
        module.read_named = lambda _: file
        monkeypatch.setattr(module.Session, "start", lambda _: order.append("started"))
        module.supports_bfloat16 = lambda _: True
        return module, order

    return make


@pytest.mark.parametrize("sage", [False, True])
@pytest.mark.parametrize("fewer", [None, Devices(ranks=1, gpus=(0,))])
def test_the_node_points_at_the_log(loader, fewer, sage, caplog):
    """Behind the start of the workers, for which it does not wait. And what ComfyUI's own argument would do."""
    module, order = loader(fewer, sage)
    module.USPLoader._load("x", "bf16", "0,1", 0, 0, Settings(), "auto")
    hint = "; gpu 0 may be faster: see ComfyUI's log" if fewer else ""
    advice = "set attention to sage in USP Optimization Settings for what ComfyUI's --use-sage-attention does"
    assert order == ["started", "asked", f"FLUX.1 on gpu 0,1{hint}" + f"; {advice}" * sage]
    for settings in (Settings(), Settings(attention="sage"), Settings(attention="flash3-fp8")):
        module.USPLoader._load("x", "bf16", "0,1", 0, 0, settings, "auto")
    assert [advice in text for text in (order[5], order[8], order[11])] == [sage, False, False]
    assert caplog.text.count("does not reach the workers") == sage, "once a process"
    module.devices_of = lambda _: Devices(ranks=2)
    module.USPLoader._load("x", "bf16", "cpu:2", 0, 0, Settings(), "auto")
    assert advice not in order[-1]


def test_machines_that_may_be_slower(loader, caplog):
    """Said once in the log, for whoever queues prompts without a page, and at the node."""
    module, order = loader()
    text, hint = (
        "a:1: 2 machines may be slower than one at cfg 1: `python -m",
        "; one machine may be faster at cfg 1: see",
    )
    kind = {"ranks": 4, "address": "a:1", "key": "k", "kind": "cuda", "bfloat16": True}
    for per_machine, slower in ((4, False), (2, True), (2, True)):
        module.devices_of = lambda _, own=per_machine: ServerDevices(per_machine=own, **kind)
        module.USPLoader._load("x", "bf16", "a:1", 0, 0, Settings(), "auto")
        assert caplog.text.count(text) == slower and (hint in order[-1]) == slower, order
