"""`plan --nnodes`: layouts on several machines, and what is slower there."""

import re
from argparse import Namespace
from types import SimpleNamespace

import pytest
from placing import header, spec_with
from test_plan_memory import GB, plan_says

from fastusp_backend.cli.file import File
from fastusp_backend.cli.several import several
from fastusp_backend.models.synthetic import FLUX_DEV, TINY_FLUX

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]


def test_layouts_of_cpu_ranks(monkeypatch, capsys, tiny_flux):
    code, said, _ = plan_says(monkeypatch, capsys, tiny_flux, "--gpus", "cpu:2", "--nnodes", "2")
    assert code == 0 and "2 machines of 2: ulysses 2 x ring 2\n" in said and "ms a step" not in said


@pytest.mark.parametrize(
    "wish, layout", [(("--ring", "2"), "ulysses 1 x ring 2"), (("--ulysses", "2"), "ulysses 2 x ring 1")]
)
def test_a_wish_is_of_all_machines(monkeypatch, capsys, tiny_flux, wish, layout):
    """One of them alone could not have it."""
    given = "--gpus", "0", "--free", "80", "--nnodes", "2", *wish
    code, said, errors = plan_says(monkeypatch, capsys, tiny_flux, *given)
    assert code == 0, errors
    assert f"2 machines of 1: {layout}\n" in said and "2 machines of 1 H100" in said
    code, _, errors = plan_says(monkeypatch, capsys, tiny_flux, *given[:-2], "--ring", "4")
    assert code == 2 and "ring = 4 cannot be used on 2 ranks" in errors


@pytest.mark.parametrize(
    "linear, card, remedy",
    [("exact", "H100", "file, or linear = fp8:"), ("fp8", "H100", "file:"), ("exact", "RTX 3090", "file:")],
)
def test_what_is_given_already_or_not_to_be_had_is_no_remedy(linear, card, remedy):
    """Of a file that fits a machine in parts alone."""
    weights = SimpleNamespace(device_bytes=2_000_000_000)
    file = SimpleNamespace(config=TINY_FLUX, settle=lambda *_, **__: (weights, 500_000_000), whole=lambda *_: weights)
    arguments = Namespace(nnodes=2, linear=linear, ulysses=0, ring=0)
    (said,) = several(file, arguments, 2, 2_000_000_000, card)
    assert said.startswith(f"2 machines: take a smaller {remedy} weights stay whole there, which takes 2.0 GB")


def test_one_machine_has_the_wire_that_is_asked_for():
    file = File(header(FLUX_DEV), FLUX_DEV, spec_with("auto"))

    def alone(wire: str) -> int:
        arguments = Namespace(nnodes=2, network=25, linear="exact", wire=wire, ulysses=0, ring=0)
        return int(re.search(r"one machine +(\d+)", "\n".join(several(file, arguments, 4, 80 * GB, "RTX 5090")))[1])

    assert alone("int8") < 0.95 * alone("exact")


def test_what_is_slower_is_said(monkeypatch, capsys, tiny_flux):
    given = "--gpus", "0,1", "--free", "80", "--nnodes", "2"
    code, said, _ = plan_says(monkeypatch, capsys, tiny_flux, *given)
    assert code == 0 and "2 machines of 2 H100 (NVLink, PCIe 5 x16), predicted, and not tried:" in said
    assert [int(found) for found in re.findall(r"all, (\d+) Gbit/s, wire exact", said)] == [10, 25, 100, 400]
    code, said, _ = plan_says(monkeypatch, capsys, tiny_flux, *given, "--network", "0.1")
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
def test_values_that_do_not_go_together(monkeypatch, capsys, tiny_flux, arguments, words):
    code, _, errors = plan_says(monkeypatch, capsys, tiny_flux, "--gpus", "0,1", "--free", "80", *arguments)
    assert code == 2 and words in errors
