"""What the unit tests share. One thread: tensors are small here, and threads that wait for each other are slow on a
busy machine."""

import json
import os
from pathlib import Path

import pytest
import torch
from channels import Pair
from fake_pool import pool  # noqa: F401 - a fixture
from formats import MINI
from node_modules import node_module  # noqa: F401 - a fixture
from small_library import world  # noqa: F401 - a fixture

from fastusp_backend.devices import list_gpus
from fastusp_backend.models.synthetic import TINY_FLUX, write_checkpoint

torch.set_num_threads(1)

ANY_PROCESSOR = """
    account attached bench block_waits call_tracer cause channel channel_refusals closeness comfyui command_line
    config control damaged_files detection detection_families detection_sd3 detection_z_image devices docs doctor
    doctor_facts doctor_trial documents engine_loading errors extra_tensors families file_state format_refusals
    fuzzed_headers gguf_header hangs large_headers library link locales meeting mesh mutations no_driver
    nodes_control nodes_memory nodes_status nvml obstacles once other_files planner pool_log pool_stop ports
    processes provenance reading readme registry rehearsal request rundir runner runs server_doors server_numbers
    servers settings shards table tls turns visible walls worker_ends worker_log workflows
""".split()
"""Tests of text, headers, sockets, processes, and of what is read from files as it lies there: nothing is computed in
them that another processor's vector instructions could make something else of. `make test-portable` leaves them out;
what is not named here is in it."""


def pytest_collection_modifyitems(items):
    folder = Path(__file__).parent
    if gone := [name for name in ANY_PROCESSOR if not (folder / f"test_{name}.py").is_file()]:
        raise pytest.UsageError(f"ANY_PROCESSOR names tests that are not there: {', '.join(gone)}")
    for item in items:
        if item.path.parent == folder and item.path.stem.removeprefix("test_") in ANY_PROCESSOR:
            item.add_marker("any_processor")


@pytest.fixture
def pair():
    """A client's channel and a worker's."""
    pair = Pair()
    yield pair
    pair.close()


@pytest.fixture
def nvml(monkeypatch, tmp_path):
    """nvml(*gpus, **more) has the driver tell of these from now on, as fake_nvml/pynvml.py reads them; it returns a
    function that counts how often it was asked. forget: whether what was told before is asked anew."""
    log = tmp_path / "nvml.log"
    log.touch()
    paths = [str(Path(__file__).parents[1] / "fake_nvml"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))

    def tells(*gpus: dict | None, forget: bool = True, **more):
        monkeypatch.setenv("FAKE_NVML", json.dumps({"gpus": gpus, "log": str(log)} | more))
        if forget:
            list_gpus.cache_clear()
        return lambda: log.read_text().count("asked")

    yield tells
    list_gpus.cache_clear()


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    """A plain file of the model whose formats are tested; not to be written to."""
    path = tmp_path_factory.mktemp("formats") / "mini.safetensors"
    write_checkpoint(str(path), MINI, seed=1)
    return path


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory):
    """A file of `TINY_FLUX`; not to be written to."""
    path = tmp_path_factory.mktemp("tiny") / "flux.safetensors"
    write_checkpoint(str(path), TINY_FLUX, seed=1)
    return path
