"""Several hosts on one machine, and what is left of their workers when they end."""

import os
import signal
from pathlib import Path

import pytest
from comfy import ComfyUI
from ending import wait_for_the_end, with_torchrun
from workflows import Graph

from fastusp_backend.worker.process import RUN_DIR_VARIABLE

pytestmark = [pytest.mark.host, pytest.mark.any_host]


def short_run(host: ComfyUI, seed: int) -> dict:
    """Samples; returns the pool's status."""
    graph = Graph()
    graph.save(graph.sample(graph.usp("cpu:1"), steps=1, seed=seed))
    assert host.run(graph).latents
    return host.pool("cpu:1")


def run_directory(pid: int) -> Path:
    variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return Path(dict(v.split("=", 1) for v in variables if v)[RUN_DIR_VARIABLE])


def test_hosts_do_not_meet_and_leave_nothing(host, second_host):
    """A host that is killed; the fixture `host` looks at one that is told to end."""
    killed, first = second_host, short_run(host, 80)
    doomed = with_torchrun(short_run(killed, 81)["pids"])
    assert not set(doomed) & set(first["pids"])
    directory = run_directory(doomed[0])
    assert directory.is_dir()
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.wait()
    assert not wait_for_the_end(doomed, 5)

    assert short_run(host, 82)["pids"] == first["pids"]
    pids = with_torchrun(first["pids"])
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert not wait_for_the_end(pids, 5)
    assert short_run(host, 83)["pids"] != first["pids"]
    assert not directory.exists(), "a pool that starts sweeps what killed ones left"
