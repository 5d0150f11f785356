"""What doctor finds out about a machine."""

import argparse
import dataclasses
import json
import os
import subprocess

import pytest
import torch

from fastusp_backend.cli import doctor
from fastusp_backend.cli.doctor import facts
from fastusp_backend.cli.doctor.check import worst
from fastusp_backend.cli.doctor.checks import examine
from fastusp_backend.devices import Devices, GpuState
from fastusp_backend.errors import DeviceError

pytestmark = pytest.mark.unit


def test_facts_of_a_machine_whose_gpus_torch_cannot_use(nvml, monkeypatch):
    """NVML tells of two GPUs that are not there."""
    nvml(*[{"nvlinks": ["switch"] * 4}] * 2)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    monkeypatch.setenv("CC", "/nowhere/cc")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,GPU-0,GPU-7")
    found = facts.gather(Devices(ranks=2, gpus=(0, 1)), "auto")
    assert [g.index for g in found.gpus] == [s.index for s in found.states] == [0, 1]
    assert found.states[1] == GpuState(
        index=1, total=143771 << 20, free=143000 << 20, compute_mode="Default", mig=False, driver="580.1"
    )
    assert found.visible.startswith("CUDA_VISIBLE_DEVICES=GPU-1,GPU-0,GPU-7 leaves GPUs 1, 0 of 2: CUDA reads nothing")
    assert found.visible_problem and "CUDA_VISIBLE_DEVICES" in found.dropped
    assert found.links["0-1"] == "NV4" and found.probe.torch == str(torch.__version__)
    assert "/nowhere/cc" in found.compiler_problem and "PYTORCH_CUDA_ALLOC_CONF" in found.dropped
    assert not found.run_dir_problem and not found.memfd_problem
    failed = {check.name for check in examine(found) if check.status == "fail"}
    assert failed >= {"torch", "C compiler"}
    json.dumps(dataclasses.asdict(found))


def test_the_environment_is_shown_as_the_help_says(monkeypatch):
    told = {"CC": "gcc", "NCCL_DEBUG": "INFO", "PYTORCH_CUDA_ALLOC_CONF": "x"}
    for name, value in (told | {"FASTUSP_KEY": "secret", "CCACHE_DIR": "x", "MASTER_ADDR": "x", "HOME": "/me"}).items():
        monkeypatch.setenv(name, value)
    assert {name for name in os.environ if facts.shown(name)} >= told.keys()
    assert not any(facts.shown(name) for name in ("FASTUSP_KEY", "CCACHE_DIR", "MASTER_ADDR", "HOME", "TORCH_HOME"))
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    assert all(pattern in parser.format_help() for pattern in facts.SHOWN)


def test_memory_that_cannot_be_sealed_is_told(monkeypatch):
    made = os.memfd_create
    assert not facts._try(facts._memfd)
    monkeypatch.setattr(os, "memfd_create", lambda name, flags: made(name, os.MFD_CLOEXEC))
    assert "PermissionError" in facts._try(facts._memfd)


def test_a_package_that_cannot_be_imported_is_a_fact(monkeypatch, tmp_path):
    (tmp_path / "msgspec.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = facts.gather(Devices(ranks=1), "cpu:1")
    assert found.probe.missing == {"msgspec": "ImportError: broken"} and "msgspec" not in found.packages
    assert worst(examine(found)) == "fail" and found.host_free is None


def test_a_look_that_hangs_or_crashes_is_told(monkeypatch):
    monkeypatch.setattr(facts, "PROBE_SECONDS", 0.01)
    assert facts._probe(Devices(ranks=1)).error == "torch and CUDA did not answer within 0 s"
    monkeypatch.setattr(facts, "PROBE_SECONDS", 60)
    monkeypatch.setattr(facts.sys, "executable", "/bin/false")
    assert "exit status 1: nothing was printed" in facts._probe(Devices(ranks=1)).error


def test_what_looks_at_gpus_sees_those_alone_and_starts_as_workers_do(monkeypatch):
    def run(command, seconds, env):
        printed = json.dumps({"torch": "|".join(str(env.get(name)) for name in names)})
        return subprocess.CompletedProcess(command, 0, printed, "")

    names = ("CUDA_VISIBLE_DEVICES", "PYTHONINSPECT", "NCCL_DEBUG")
    monkeypatch.setattr(facts, "run", run)
    monkeypatch.setattr(facts, "cuda_visible", lambda devices: f"GPU-{devices.gpus[0]}")
    for name, value in zip(names, ("7", "1", "INFO"), strict=True):
        monkeypatch.setenv(name, value)
    assert facts._probe(Devices(ranks=1, gpus=(3,))).torch == "GPU-3|None|INFO"


def test_cpu_ranks_are_examined_without_asking_for_gpus(monkeypatch):
    monkeypatch.setattr(facts, "list_gpus", lambda: pytest.fail("NVML was asked"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert facts.gather(Devices(ranks=2), "cpu:2").visible == ""


def test_links_that_cannot_be_asked_for_leave_the_rest(monkeypatch):
    def fail():
        raise DeviceError("the driver says nothing")

    monkeypatch.setattr(facts, "gpu_links", fail)
    assert facts._links() == {}
