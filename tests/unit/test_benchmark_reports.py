"""The benchmarks' own parts: tables of runs that went wrong in part, what a captured run holds, how scripts start."""

import gc
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

pytestmark = pytest.mark.unit

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = ("step", "ablation", "loop", "load", "lora", "control", "caches", "quality", "plot", "host", "scale")
STARTS = """
import os, runpy, sys
import torch  # once: a forked process has it, and nothing of the repository
folder, *scripts = sys.argv[1:]
for script in scripts:
    if not (child := os.fork()):
        sys.path.insert(0, folder)
        sys.argv = [f"{folder}/{script}.py", "--help"]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code or 0)  # to take torch apart takes longer than all else
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{script}.py --help failed")
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def row(tmp_path):
    """row(who, config, result): as a rank says it and a process set adds to it, with `result` as its output."""

    def made(who: str, config: str, result: float, **fields) -> dict:
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.pt"
        torch.save(torch.full((4,), result), output)
        case = {"size": 64, "texts": [8], "batch": 1}
        common = {"case": case, "ranks": 2, "reference": False, "lossy": False, "link": "nvlink", "set": 0}
        ours = {"layout": "ulysses 2 x ring 1"} if who == "ours" else {}
        figures = {"median": 10.0, "min": 9.0, "peak": 1.0, "warm_up": 0.0}
        return {"who": who, "config": config, **common, **ours, **figures, "output": str(output), **fields}

    return made


def test_without_a_reference_the_errors_are_blank(row):
    import ablation
    import report

    failed = row("ours", "eager", 1.0, reference=True, failed="RuntimeError: out of memory")
    timed, measured_against = report.finish([failed, row("ours", "overlap", 1.0)])
    assert [x["config"] for x in timed] == ["overlap"] and measured_against == ""
    assert "error" not in timed[0] and "own_error" not in timed[0] and not timed[0]["wrong"]
    assert "FastUSP overlap, ulysses 2 x ring 1 | 10.0" in " ".join(report.tables(timed).split())
    assert ablation.table([("level", timed[0])], "nvlink").splitlines()[-1].endswith("|       |")


@pytest.mark.parametrize("result", [0.0, float("nan")])
def test_a_wrong_result_is_marked_and_nothing_is_compared_with_it(row, result):
    import report

    rows = [
        row("diffusers-ulysses", "eager", 1.0, reference=True),
        row("diffusers-ulysses", "graph", result, median=5.0),
        row("diffusers-ulysses", "eager", 1.05, median=20.0),
        row("cache-dit-float8", "eager", 0.5, median=4.0, lossy=True),
        row("ours", "overlap", 1.0),
    ]
    timed, _ = report.finish(rows)
    assert [x["wrong"] for x in timed] == [True, False, False, False]
    assert timed[-1]["over_peer"] == 2.0 and "over_peer" not in timed[0]
    assert "diffusers-ulysses, graph, result wrong " in report.tables(timed)


def test_efficiency_compares_one_configuration_with_itself(row):
    import report

    one, two = {"ranks": 1}, {"ranks": 2}
    rows = [
        row("ours", "overlap", 1.0, median=6.0, **two),
        row("ours", "fp8", 1.0, median=4.0, lossy=True, **two),
        row("ours", "overlap", 1.0, median=10.0, **one),
    ]
    timed, _ = report.finish(rows)
    assert report.efficiency(timed) == "Parallel efficiency of overlap on 2 ranks against our own 1: 83.3%"
    assert report.efficiency(timed[:2]) == ""


def test_the_ablation_s_ring_builds_on_no_row_above(row):
    import ablation

    rows = [
        row("diffusers-ulysses", "eager", 1.0, median=20.0),
        row("ours", "eager", 1.0, median=16.0, set=1),
        row("ours", "overlap", 1.0, median=8.0, set=1),
        row("ours", "unpipelined", 1.0, median=12.0, set=2),
        row("ours", "overlap", 1.0, median=10.0, set=2),
    ]
    lines = ablation.table([(x["config"], x) for x in rows], "nvlink").splitlines()[-len(rows) :]
    assert [line.split("|")[3].strip() for line in lines] == ["", "1.25", "2.00", "", "1.20"]


def test_a_captured_run_keeps_its_inputs(monkeypatch):
    """Its kernels read them at every replay; freed, they are overwritten by whoever allocates next."""
    pytest.importorskip("diffusers")
    import peers

    monkeypatch.setattr(peers.torch, "cuda", MagicMock())
    monkeypatch.setattr(peers.dist, "barrier", lambda: None)
    given = torch.ones(3)
    alive = weakref.ref(given)
    replay = peers._graphed(lambda given=given: given + 1)
    del given
    gc.collect()
    assert alive() is not None and replay().tolist() == [2.0, 2.0, 2.0]


@pytest.mark.any_processor
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_every_script_starts_from_any_folder(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", STARTS, str(BENCHMARKS), *SCRIPTS]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(f"usage: {script}.py" in done.stdout for script in SCRIPTS)


@pytest.mark.parametrize(
    "steps, said",
    [
        ([(1, 120.0), (2, 66.0), (4, 36.0), (8, 22.0)], "it scales to 8 GPUs: 5.5 times one's speed"),
        ([(1, 120.0), (2, 98.0), (4, 60.0), (8, 36.0)], "from 8 GPUs on less than half of each is used: 3.3 times"),
        ([(1, 120.0), (2, 130.0), (4, 84.0)], "it stops scaling at 1 GPUs: 2 take 130.0 ms, 1 120.0"),
    ],
)
def test_where_it_stops_scaling(steps, said):
    import scale

    assert scale.where_it_ends(steps).startswith(said)


def test_of_our_kernels_those_that_only_signal_are_exchange():
    """A profile tells kernels by their names alone."""
    import breakdown

    kernels = BENCHMARKS.parent / "fastusp_backend" / "kernels"
    for file in kernels.glob("*.py"):
        names = set(re.findall(r"^ *def (\w+_kernel)\(", file.read_text(encoding="utf-8"), re.MULTILINE))
        kinds = {breakdown.kind(name) for name in names}
        assert kinds <= {"exchange" if file.name == "signals.py" else "elementwise"}, (file.name, names, kinds)
