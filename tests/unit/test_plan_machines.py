"""`plan --nnodes`: layouts on several machines, and what is slower there."""

import re

import pytest
from test_plan_memory import plan_says

from fastusp_backend.models.synthetic import TINY_FLUX, write_checkpoint

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = tmp_path_factory.mktemp("plan") / "flux.safetensors"
    write_checkpoint(str(found), TINY_FLUX, seed=1)
    return found


def test_layouts_of_cpu_ranks(monkeypatch, capsys, path):
    code, said, _ = plan_says(monkeypatch, capsys, path, "--gpus", "cpu:2", "--nnodes", "2")
    assert code == 0 and "2 machines of 2: ulysses 2 x ring 2\n" in said and "ms a step" not in said


def test_what_is_slower_is_said(monkeypatch, capsys, path):
    given = "--gpus", "0,1", "--free", "80", "--nnodes", "2"
    code, said, _ = plan_says(monkeypatch, capsys, path, *given)
    assert code == 0 and "2 machines of 2 H100 (NVLink, PCIe 5 x16), predicted, and not tried:" in said
    assert [int(found) for found in re.findall(r"all, (\d+) Gbit/s, wire exact", said)] == [10, 25, 100, 400]
    code, said, _ = plan_says(monkeypatch, capsys, path, *given, "--network", "0.1")
    (row,) = [line for line in said.splitlines() if "all, 0.1 Gbit/s, wire exact" in line]
    assert code == 0 and row.endswith("cfg 1")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--network", "10"), "Give --nnodes too"),
        (("--nnodes", "0"), "Give --nnodes a number of machines"),
        (("--nnodes", "2", "--network", "0"), "Give --network Gbit/s"),
    ],
)
def test_values_that_do_not_go_together(monkeypatch, capsys, path, arguments, words):
    code, _, errors = plan_says(monkeypatch, capsys, path, "--gpus", "0,1", "--free", "80", *arguments)
    assert code == 2 and words in errors
