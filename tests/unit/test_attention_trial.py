"""The one call by which packages of attention are tried: what fails, what is wrong, and what is taken instead. What a
graph has is tried on GPUs (tests/gpu/test_eight_bit_attention.py)."""

import pytest
import torch
from attention_packages import clear, install

from fastusp_backend.attention import local, lossy, sage, trial

pytestmark = pytest.mark.unit

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forget():
    yield
    clear()


def test_packages_are_tried_once(monkeypatch, caplog):
    install(monkeypatch, "sage")
    tried = []

    def attend(*given):
        tried.append(given)
        raise AssertionError("SM90 kernel is not available\nand more")

    cpu = torch.device("cpu")
    assert [trial.problem(attend, cpu, torch.bfloat16) for _ in range(2)] == ["SM90 kernel is not available"] * 2
    assert len(tried) == 1 and caplog.text.count("is not used: SM90 kernel is not available") == 1
    for name, functions in lossy.BACKENDS.items():
        for function in {*sum(functions, ())}:
            # One that is not installed is called, and fails.
            assert bool(trial.problem(function, cpu, torch.bfloat16)) == (name == "flash3-fp8")


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("wrong", [lambda x: x * 1.2, lambda x: x * torch.nan], ids=["another", "NaN"])
def test_results_that_are_wrong_are_found(which, wrong):
    def attend(*given):
        results = [*local.math(*given)]
        results[which] = wrong(results[which])
        return tuple(results)

    assert "where less than 0.1 is right" in trial.problem(attend, torch.device("cpu"), torch.float32)
    assert trial.problem(local.math, torch.device("cpu"), torch.float32) == ""


@pytest.mark.parametrize("ring", [False, True])
def test_what_no_graph_contains_is_not_taken(monkeypatch, ring):
    """As the kernels of SageAttention 2 in CUDA: that in Triton is, where the graph has it."""
    install(monkeypatch, "sage")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    outside = {*lossy.BACKENDS["sage"][0]}
    problem = "in a CUDA graph its error is nan"
    monkeypatch.setattr(trial, "problem", lambda attend, *_: problem if attend in outside else "")
    assert local.choose("sage", CUDA, torch.bfloat16, ring=ring) == ("sage", sage.sage_triton)
    outside.add(sage.sage_triton)
    with pytest.raises(ValueError, match="^install a sageattention .* or choose another .*: in a CUDA graph"):
        local.choose("sage", CUDA, torch.bfloat16, ring=ring)
