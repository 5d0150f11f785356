"""The benchmarks run: on CPU ranks with tiny models, from the command line to the written results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LAUNCHED = os.environ | {"PET_NO_PYTHON": "1", "PET_NNODES": "4", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5"}
"""By another launcher, of which torchrun reads the options."""
TINY = ("--tiny", "--device", "cpu", "--text", "8", "--count", "1")


COMMANDS = {
    "step": ("step.py", "--sizes", "64", "--variants", "eager-overlap,wire-fp8-eager,linear-fp8-eager,weights-Q4_0-eager,overlap")
    + ("--peers", "diffusers-1gpu,diffusers-ring", "--no-repeat"),
    "ablation": ("ablation.py", "--size", "64", "--model", "qwen"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results(name): what a command has written. They run side by side: most of their time is one process' imports."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("benchmarks")
    running = {}
    for name, (script, *arguments) in COMMANDS.items():
        command = [sys.executable, str(BENCHMARKS / script), *TINY, *arguments, "--out", str(folder / name)]
        running[name] = subprocess.Popen(
            command, cwd=folder, env=LAUNCHED, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def of(name: str) -> dict:
        printed, _ = running[name].communicate(timeout=120)
        assert running[name].returncode == 0, printed
        assert (folder / f"{name}.md").read_text() in printed
        return json.loads((folder / f"{name}.json").read_text())

    yield of
    for process in running.values():
        process.terminate()
        process.wait()


def test_a_step_beside_a_peer(results):
    found = results("step")
    assert [(row["who"], row["config"], row["ranks"]) for row in found["rows"]] == [
        ("ours", "eager-overlap", 2),
        ("ours", "wire-fp8-eager", 2),
        ("ours", "linear-fp8-eager", 2),
        ("ours", "weights-Q4_0-eager", 2),
        ("diffusers-1gpu", "eager", 1),
    ]
    exact, wire, linear, packed, peer = (row["error"] for row in found["rows"])
    assert max(exact, peer) < 1e-5 < 1e-3 < min(wire, linear, packed) and max(wire, linear) < 0.1 and packed < 0.3
    skipped = ("diffusers-ring", "overlap", "compile", "graph")
    assert found["problems"] == [f"{name}: skipped, for GPUs only" for name in skipped]


def test_the_ablation_and_its_breakdown(results):
    (row,) = results("ablation")["rows"]
    assert row["config"] == "eager+mods" and row["own_error"] < 1e-5
    parts = row["breakdown"]
    assert parts["gemm"] > 0 and parts["attention"] > 0 and parts["exchange"] >= parts["exposed"] > 0


def test_the_quality_of_lossy_options():
    command = [sys.executable, str(BENCHMARKS / "quality.py"), "--tiny", "--device", "cpu"]
    command += ["--size", "64", "--text", "9", "--steps", "1"]
    done = subprocess.run(command, env=LAUNCHED, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[3:]]
    assert len(rows) == 2 * 2 * 5  # weights, layouts, options
    for _, _, option, single, _ in rows:
        errors = [float(x) for x in single.split()]
        assert len(errors) == 3 and all(x < 1e-5 if option == "exact" else 1e-4 < x < 0.1 for x in errors), option
