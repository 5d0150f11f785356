"""What the page is told of USP Loader's values before anything runs."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from placing import header, spec_with

import fastusp_backend.cli.file
import fastusp_backend.models.prediction  # noqa: F401 - the node takes them as parts of its own package
from fastusp_backend.config import FileState, Settings
from fastusp_backend.devices import ServerDevices, local_devices
from fastusp_backend.errors import CheckpointError, RequestError
from fastusp_backend.models.synthetic import FLUX_DEV, QWEN_IMAGE
from fastusp_backend.servers import Server

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]

GIB = 1 << 30
RTX_4090 = {"name": "NVIDIA GeForce RTX 4090", "memory": [24 * GIB, GIB], "pcie": [4, 16]}
STORAGE = ("default", "fp8_e4m3fn")
JOINED = {"ancestors": {"1": 40}}


@pytest.fixture
def planning(node_module, monkeypatch):
    """planning(config, dtype) is the node's module where every file has such a model."""
    monkeypatch.setitem(sys.modules, "aiohttp", SimpleNamespace(web=SimpleNamespace(Request=object, Response=object)))

    closed = []

    def make(config=FLUX_DEV, dtype=torch.bfloat16):
        def read(name):
            if name == "gone":
                raise CheckpointError("unet_name: there is no 'gone'")
            source = SimpleNamespace(close=lambda: closed.append(name))
            return SimpleNamespace(header=header(config, dtype), config=config, source=source)

        loader = {"STORAGE": STORAGE, "read_named": read, "state_of": lambda _: FileState(0, 0, 0, 0)}
        loader["spec_on"] = lambda devices, file, dtype: spec_with("auto")
        links = {"known_links": node_module("fewer_gpus").known_links}
        neighbours = {"comfyui": {"PromptServer": None}, "answers": dict.fromkeys(("FOREIGN", "foreign", "refused"))}
        neighbours["servers"] = {"devices_of": local_devices, "server_of": lambda gpus: None}
        neighbours["pools"] = {"all_pools": list}
        neighbours["machines"] = {"may_be_slower": node_module("machines").may_be_slower}
        module = node_module("planning", loader=loader, fewer_gpus=links, **neighbours)
        module.closed = closed
        return module

    return make


def previewed(module, **values):
    given = {"unet_name": "x", "gpus": "0,1"} | values
    return module.preview(module.values_of(msgspec.json.encode(given)))


def test_two_gpus(planning, nvml):
    nvml(RTX_4090 | JOINED, RTX_4090)
    told = previewed(planning(dtype=torch.float8_e4m3fn), settings={"wire": "int8"})
    step, layouts, weights = told.pop("lines")
    assert told == {"gpus": [0, 1]}
    assert re.fullmatch(r"\d+ ms a step \(\d\.\d\d x one GPU\), predicted for RTX 4090 at 1024 x 1024", step)
    assert layouts == "gpu 0,1: ulysses 2 x ring 1; for 2 prompts or images batch 2 x ulysses 1 x ring 1"
    assert weights.startswith("weights: whole, ") and weights.endswith(" GB a device, of 25.8 GB")
    assert "cfg above 1" not in step, "its guidance is a number"


def test_a_server_that_only_the_workflow_names(planning, monkeypatch):
    """Is not asked: whoever made the workflow would have whoever opens it connect there. One in fastusp.toml is, and
    one that has a pool."""
    module, asked = planning(), []

    def devices_of(gpus):
        asked.append(gpus)
        return local_devices("cpu:2")

    monkeypatch.setattr(module, "devices_of", devices_of)
    monkeypatch.setattr(module, "server_of", lambda gpus: Server("a:1", Path("key"), listed=gpus == "box"))
    told = previewed(module, gpus="a:1")
    assert told == {"gpus": [], "lines": ["a:1 is asked when it runs: it is not in fastusp.toml"]} and not asked
    previewed(module, gpus="box")
    monkeypatch.setattr(module, "all_pools", lambda: [SimpleNamespace(devices="a:1")])
    previewed(module, gpus="a:1")
    assert asked == ["box", "a:1"]


@pytest.mark.parametrize(
    ("per_machine", "said"),
    [
        (
            2,
            "2 machines may be slower than one at cfg 1: `python -m fastusp_backend plan FILE --nnodes 2 "
            "--network GBIT` there predicts both",
        ),
        (4, "no times known for a server's devices: `bench` measures them there"),
    ],
)
def test_a_server(planning, monkeypatch, per_machine, said):
    module = planning()
    server = ServerDevices(ranks=4, address="a:1", key="k", kind="cuda", per_machine=per_machine, bfloat16=True)
    monkeypatch.setattr(module, "devices_of", lambda gpus: server)
    step, layouts, _ = previewed(module, gpus="a:1")["lines"]
    assert step == said and layouts.startswith("a:1: ulysses ")


def milliseconds(told):
    return int(re.search(r"(\d+) ms", told["lines"][0])[1])


def test_settings_count(planning, nvml):
    """Tokens in 8 bits take less of a slow link; without peer access blocks that do not fit come from the host."""
    small = RTX_4090 | {"memory": [20 * GIB, GIB]}
    nvml(small | JOINED, small)
    module = planning()
    exact, wire = previewed(module), previewed(module, settings={"wire": "int8"})
    assert milliseconds(wire) < milliseconds(exact)
    assert "come from host memory" in exact["lines"][2]
    assert " shared: " in previewed(module, settings={"weights": "shared"})["lines"][2]
    assert "whole, " in previewed(module, settings={"linear": "fp8"})["lines"][2]


def test_both_kinds_of_steps_where_the_model_is_guided_by_two_prompts(planning, nvml):
    h200 = {"name": "NVIDIA H200", "memory": [141 * GIB, GIB]}
    nvml(h200 | JOINED, h200)
    step = previewed(planning(QWEN_IMAGE))["lines"][0]
    assert step.count(" x one GPU)") == 2 and ", cfg above 1: " in step
    assert previewed(planning(QWEN_IMAGE), batch_parallel="off")["lines"][1] == "gpu 0,1: ulysses 2 x ring 1"


def test_what_one_gpu_has_no_room_for(planning, nvml):
    small = {"name": "NVIDIA H100 80GB HBM3", "memory": [6 * GIB, GIB]}
    nvml(small | {"nvlinks": [1], "ancestors": {"1": 40}}, small | {"nvlinks": [0]})
    told = previewed(planning(dtype=torch.float8_e4m3fn))
    assert told["lines"][2].endswith("; one GPU has no room for them") and "x one GPU" not in told["lines"][0]


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ({"name": "Tesla T4", "memory": [60 * GIB, GIB]}, "no times known for Tesla T4: measure them"),
        ({"name": "Tesla T4", "memory": None}, "NVML tells no size of its memory"),
        (RTX_4090 | {"memory": [60 * GIB, GIB]}, "no times known for NVIDIA GeForce RTX 4090: measure them"),
    ],
)
def test_what_is_not_known_is_said(planning, nvml, gpu, said):
    nvml(gpu, gpu)
    told = previewed(planning())
    assert said in "\n".join(told["lines"]) and "problem" not in told


def test_cpu_ranks(planning):
    told = previewed(planning(), gpus="cpu:2")
    assert told["gpus"] == [] and told["lines"][1].startswith("cpu:2: ulysses 2 x ring 1")
    assert told["lines"][0] == "no times known for CPU ranks: measure them"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"gpus": "7"}, "Name GPUs of this machine, 0 (NVIDIA GeForce RTX 4090), 1 "),
        ({"gpus": "cpu:2", "unet_name": "gone"}, "unet_name: there is no 'gone'"),
        ({"gpus": "cpu:2", "ulysses": 3}, "Set 0, or a legal layout (ulysses 2 x ring 1, ulysses 1 x ring 2): "),
        ({"gpus": "cpu:3", "batch_parallel": "on"}, "Set batch_parallel to auto or off: on needs an even number"),
        ({"gpus": "0", "settings": {"weights": "shared"}}, "Set weights to host or auto"),
    ],
)
def test_what_cannot_be_is_a_problem(planning, nvml, values, problem):
    nvml(RTX_4090 | JOINED, RTX_4090)
    told = previewed(planning(), **values)
    assert told["problem"].startswith(problem) and not told["lines"]


def test_inputs_that_other_nodes_compute(planning):
    module = planning()
    assert previewed(module, gpus=None)["lines"] == ["gpus comes from another node: known when it runs"]
    assert "unet_name comes from another node" in previewed(module, gpus="cpu:2", unet_name=None)["lines"][0]
    assert "ulysses 2 x ring 1" in previewed(module, gpus="cpu:2", ulysses=None, ring=None)["lines"][1]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"gpus": 3}',
        b'{"ulysses": "2"}',
        b'{"weight_dtype": "int4"}',
        b'{"settings": {"wire": "x"}}',
        b'{"gpus": "\xff"}',
        b'{"x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
    ids=lambda body: body[:24].decode(errors="replace"),
)
def test_only_the_nodes_inputs_are_taken(planning, body):
    with pytest.raises(RequestError, match="^Send USP Loader's inputs by their names: "):
        planning().values_of(body)


def test_a_file_that_was_read_is_not_kept_open(planning):
    module = planning()
    for _ in range(2):
        previewed(module, gpus="cpu:2", unet_name="x")
    assert module.closed == ["x"]


def test_settings_have_their_defaults(planning):
    assert planning().Values().settings == Settings()
