"""What doctor says of trials that fail."""

import os

import pytest
import torch

from fastusp_backend.cli.doctor import trial
from fastusp_backend.config import Layout
from fastusp_backend.devices import Devices
from fastusp_backend.errors import PoolError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "problem, gpus, advice",
    [
        ("RuntimeError: Failed to find C compiler", 1, "gcc"),
        ("NCCL WARN Error: failed to extend /dev/shm/nccl-x to 9 bytes: No space left on device", 2, "--shm-size"),
        ("pidfd_getfd: Operation not permitted", 2, "SYS_PTRACE"),
        ("rank 1 (H200) ran out of memory while it loaded", 2, "nvidia-smi"),
        ("rank 0 (process 5) was ended by SIGKILL", 0, "out of memory"),
        ("gave no result within 240 s: its processes are still running", 2, "NCCL_P2P_DISABLE=1"),
        ("gave no result within 240 s: its processes are still running", 1, "--seconds"),
        ("rank 0 (process 5) made no progress for 12 s while it evaluated the model", 2, "NCCL_P2P_DISABLE=1"),
        ("rank 0 was not ready within 300 s of the start, while it imported its libraries", 2, "NCCL_P2P_DISABLE=1"),
        ("[rank 0 stdout] NCCL WARN Cuda failure 'peer access is not supported'", 2, "NCCL_P2P_DISABLE=1"),
        ("[rank 0 stdout] NCCL version 2.28.9: something else", 2, "--json"),
    ],
)
def test_advice_for_what_a_pool_says(problem, gpus, advice):
    assert advice in trial.advise(problem, gpus)


@pytest.mark.parametrize(
    "latents, expected, status, text",
    [
        ([1.0, 2.0], [1.0, 2.0], "ok", "started in 3.0 s; gloo, exact wire; differs from one rank by 0.0e+00"),
        ([1.0, 2.0], None, "ok", "started in 3.0 s; gloo, exact wire"),
        ([1.0, 3.0], [1.0, 2.0], "fail", "by 4.5e-01, above 1e-03"),
        ([1.0, float("nan")], [1.0, 2.0], "fail", "not finite"),
    ],
)
def test_results_are_judged(latents, expected, status, text):
    expected = None if expected is None else torch.tensor(expected)
    check = trial.judge("trial", torch.tensor(latents), expected, 3.0, "gloo, exact wire", 1e-3)
    assert check.status == status and text in check.text and bool(check.advice) == (status == "fail")


def test_kinds_of_layouts():
    assert [str(x) for x in trial.kinds(8, 8)] == ["ulysses 8 x ring 1", "ulysses 2 x ring 4", "ulysses 1 x ring 8"]
    assert [str(x) for x in trial.kinds(2, 4)] == ["ulysses 2 x ring 1", "ulysses 1 x ring 2"]


class NoPool:
    def __init__(self, devices):
        self.devices = devices

    def close(self):
        pass


@pytest.mark.parametrize("cured", [True, False])
def test_gpus_that_fail_together_are_tried_without_direct_access(monkeypatch, cured):
    def run(job, pool, layout):
        if layout.ulysses == 1 and not (cured and os.environ.get("NCCL_P2P_DISABLE") == "1"):
            raise PoolError("gave no result within 9 s")
        return torch.ones(2), None

    monkeypatch.setattr(trial.Job, "run", run)
    monkeypatch.setattr(trial, "Pool", NoPool)
    monkeypatch.setattr(NoPool, "held", type("Held", (), {"transport": "host memory"}), raising=False)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    spec = type("Spec", (), {"compute": "bfloat16"})
    job, devices = trial.Job(spec, (None, None), 9.0, print), Devices(ranks=2, gpus=(0, 1))
    first, second, third = trial._together(job, devices, trial.kinds(2, 4), torch.ones(2))
    assert (first.status, second.status) == ("ok", "fail") and "NCCL_P2P_DISABLE" not in os.environ
    assert third.name == "trial, ulysses 1 x ring 2, with NCCL_P2P_DISABLE=1"
    assert third.status == ("warn" if cured else "fail") and (not cured or "IOMMU" in third.advice)
    cpu = list(trial._together(job, Devices(ranks=2), [Layout(ulysses=1, ring=2)], torch.ones(2)))
    assert [check.status for check in cpu] == ["fail"]
