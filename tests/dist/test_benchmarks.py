"""The benchmarks run: on CPU ranks with tiny models, from the command line to the written results."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from pools import forked

pytestmark = [pytest.mark.dist, pytest.mark.thorough]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LAUNCHED = {"PET_NO_PYTHON": "1", "PET_NNODES": "4", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5"}
"""By another launcher, of which torchrun reads the options."""
TINY = ("--tiny", "--device", "cpu", "--text", "8", "--count", "1")
VARIANTS = "eager-overlap,wire-fp8-eager,linear-fp8-eager,weights-Q4_0-eager,overlap"
STEP = ("--sizes", "64", "--variants", VARIANTS, "--peers", "diffusers-1gpu,diffusers-ring", "--no-repeat")
COMMANDS = {
    "step": (*TINY, *STEP),
    "ablation": (*TINY, "--size", "64", "--model", "qwen"),
    "quality": ("--tiny", "--device", "cpu", "--size", "64", "--text", "9", "--steps", "1", "--captions", "1"),
}


def _run(name: str, arguments: tuple[str, ...], folder: str) -> None:
    """The script as a command in `folder`, which prints to a file there."""
    os.chdir(folder)
    os.environ |= LAUNCHED
    with open(f"{name}.out", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = [str(BENCHMARKS / f"{name}.py"), *arguments]
    sys.path.insert(0, str(BENCHMARKS))
    runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """printed(name): what a command has printed; and the folder that they write to. They run side by side: most of
    their time is one process' imports."""
    folder = tmp_path_factory.mktemp("benchmarks")
    running = {}
    for name, arguments in COMMANDS.items():
        out = () if name == "quality" else ("--out", str(folder / name))
        running[name] = forked().Process(target=_run, args=(name, (*arguments, *out), str(folder)))
        running[name].start()

    def of_command(name: str) -> str:
        running[name].join(240)
        said = (folder / f"{name}.out").read_text()
        assert running[name].exitcode == 0, said
        return said

    yield of_command, folder
    for process in running.values():
        process.terminate()
        process.join()


@pytest.fixture
def results(printed):
    """results(name): what a command has written."""
    pytest.importorskip("diffusers")
    of_command, folder = printed

    def of(name: str) -> dict:
        said = of_command(name)
        assert (folder / f"{name}.md").read_text() in said
        return json.loads((folder / f"{name}.json").read_text())

    return of


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


def test_the_quality_of_lossy_options(printed):
    of_command, _ = printed
    lines = [line for line in of_command("quality").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]  # behind the head
    rows, pictures = rows[: 2 * 2 * 6], rows[2 * 2 * 6 :]  # weights, layouts, options
    caches = [row[1] for row in pictures if row[1].startswith("cache")]
    assert len(caches) == 2 * 6 and len(set(caches)) == 6
    options = [row[2] for row in rows[:6]]
    together = [f"{options[-1]}, cache {kind}" for kind in ("easy", "first_block")]
    assert [row[1] for row in pictures[2:]] == ["exact, eager", *2 * (options + caches[:6] + together)]
    pictures = [row for row in pictures if row[1] not in caches]
    assert all((float(row[2]) > 100) == row[1].startswith("exact") for row in pictures[2:])
    for _, _, option, single, _ in rows:
        errors = [float(x) for x in single.split()]
        assert len(errors) == 3 and all(x < 1e-5 if option == "exact" else 1e-4 < x < 0.1 for x in errors), option
