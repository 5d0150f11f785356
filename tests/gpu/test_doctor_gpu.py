"""doctor and bench on real GPUs: a machine that works is found to work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import SMALL

from fastusp_backend.devices import gpu_loads
from fastusp_backend.models.synthetic import write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROOT = Path(__file__).resolve().parents[2]


def command_line(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fastusp_backend", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_what_gpus_do():
    """As the panel is sent it."""
    torch.ones(1 << 28, device="cuda").sum().item()
    loads = gpu_loads()
    assert [gpu["index"] for gpu in loads] == list(range(len(loads))) and len(loads) >= torch.cuda.device_count()
    for gpu in loads:
        assert 0 <= gpu["used"] <= gpu["total"] and 0 <= gpu["utilisation"] <= 100 and 10 <= gpu["temperature"] <= 110
    assert max(gpu["used"] for gpu in loads) > 1 << 30


def test_doctor():
    gpus = min(2, torch.cuda.device_count())
    done = command_line("doctor", "--gpus", ",".join(map(str, range(gpus))), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    probe, found = told["facts"]["probe"], {check["name"]: check for check in told["checks"]}
    assert len(probe["names"]) == len(probe["peers"]) == len(probe["symmetric"]) == gpus
    assert len(told["facts"]["states"]) == gpus
    assert found["torch"]["status"] == found["triton"]["status"] == "ok"
    assert found["trial, one rank"]["status"] == "ok"
    if gpus == 2:
        assert "GB/s" in found["trial, ulysses 2 x ring 1"]["text"]
        assert "GPU 0 - GPU 1" in found


def test_bench(tmp_path):
    path = tmp_path / "flux.safetensors"
    write_checkpoint(str(path), SMALL, dtype=torch.bfloat16)
    done = command_line("bench", str(path), "--gpus", "0", "--size", "256", "--text", "16", "--steps", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    _, _, exact, *others = done.stdout.splitlines()
    assert exact.split()[6:8] == ["exact", "exact"] and "not run" not in exact
    assert ["exact", "fp8"] in [row.split()[6:8] for row in others], done.stdout
    assert others[-1].startswith(("Recommended, without loss: gpus = 0 (1 rank)", "In 8 bits"))
