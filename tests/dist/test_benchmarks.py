"""The benchmarks run: on CPU ranks with tiny models, from the command line to the written results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ("--tiny", "--device", "cpu", "--text", "8", "--count", "1")


def results(tmp_path, script: str, *arguments: str) -> dict:
    command = [sys.executable, str(BENCHMARKS / script), *TINY, *arguments, "--out", str(tmp_path / "results")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "results.md").read_text() in done.stdout
    return json.loads((tmp_path / "results.json").read_text())


def test_a_step_beside_a_peer(tmp_path):
    pytest.importorskip("diffusers")
    found = results(
        tmp_path,
        *("step.py", "--sizes", "64", "--variants", "eager-overlap,overlap"),
        *("--peers", "diffusers-1gpu,diffusers-ring", "--no-repeat"),
    )
    assert [(row["who"], row["config"], row["ranks"]) for row in found["rows"]] == [
        ("ours", "eager-overlap", 2),
        ("diffusers-1gpu", "eager", 1),
    ]
    assert all(row["error"] < 1e-5 for row in found["rows"])
    assert found["problems"] == ["overlap, compile, graph, diffusers-ring: skipped, for GPUs only"]


def test_the_ablation_and_its_breakdown(tmp_path):
    found = results(tmp_path, "ablation.py", "--size", "64", "--model", "qwen")
    (row,) = found["rows"]
    assert row["config"] == "eager+mods" and row["own_error"] < 1e-5
    parts = row["breakdown"]
    assert parts["gemm"] > 0 and parts["attention"] > 0 and parts["exchange"] >= parts["exposed"] > 0
