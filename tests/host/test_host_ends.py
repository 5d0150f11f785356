"""Several hosts on one machine, and what is left of their workers when they end."""

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from comfy import ComfyUI
from workflows import DEV, Graph

from fastusp_backend.worker.process import RUN_DIR_VARIABLE

pytestmark = [pytest.mark.host, pytest.mark.any_host]


def short_run(host: ComfyUI, seed: int) -> dict:
    """Samples; returns the pool's status."""
    graph = Graph()
    graph.save(graph.sample(graph.usp("cpu:1"), steps=1, seed=seed))
    assert host.run(graph).latents
    return host.pool("cpu:1")


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def with_torchrun(pids: list[int]) -> list[int]:
    """The ranks and the process that started them."""
    return [*pids, int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])]


def run_directory(pid: int) -> Path:
    variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return Path(dict(v.split("=", 1) for v in variables if v)[RUN_DIR_VARIABLE])


def wait_for_the_end(pids: list[int], seconds: float) -> list[int]:
    """Those that still live after so long."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if lives(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_hosts_do_not_meet_and_leave_nothing(host, second_host, tmp_path):
    killed, first = second_host, short_run(host, 80)
    with ExitStack() as stack:
        terminated = ComfyUI(host.path, tmp_path)
        stack.callback(terminated.stop)
        (tmp_path / "models/diffusion_models" / DEV).symlink_to(host.base / "models/diffusion_models" / DEV)
        terminated.wait_until_ready()

        doomed = with_torchrun(short_run(killed, 81)["pids"])
        assert not set(doomed) & set(first["pids"])
        directory = run_directory(doomed[0])
        assert directory.is_dir()
        os.kill(killed.process.pid, signal.SIGKILL)
        killed.process.wait()
        assert not wait_for_the_end(doomed, 5)

        pids = with_torchrun(short_run(terminated, 82)["pids"])
        assert not directory.exists(), "a pool that starts sweeps what killed ones left"
        assert short_run(host, 83)["pids"] == first["pids"]
        terminated.stop()
        assert not wait_for_the_end(pids, 5)

    assert short_run(host, 84)["pids"] == first["pids"]
