"""The one call by which packages of attention are tried: what fails, what is wrong, and what is taken instead. What a
graph has is tried on GPUs (tests/gpu/test_eight_bit_attention.py)."""

import contextlib
import functools
import sys
from collections import UserList
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from attention_packages import clear, install
from support import SMALL, SMALL_SD3

from fastusp_backend.attention import local, lossy, sage, trial
from fastusp_backend.comm.mesh import single_rank_mesh
from fastusp_backend.config import Layout, Settings
from fastusp_backend.engine import Denoiser
from fastusp_backend.engine import denoiser as denoisers

pytestmark = pytest.mark.unit

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
HEADS = 12, 128


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

    assert [trial.problem(attend, CPU, torch.bfloat16, HEADS, lse=True) for _ in range(2)] == [
        "SM90 kernel is not available"
    ] * 2
    assert len(tried) == 1 and caplog.text.count("is not used: SM90 kernel is not available") == 1
    for name, functions in lossy.BACKENDS.items():
        for function in {*sum(functions, ())}:
            # One that is not installed is called, and fails.
            assert bool(trial.problem(function, CPU, torch.bfloat16, HEADS, lse=False)) == (name == "flash3-fp8")


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("wrong", [lambda x: x * 1.2, lambda x: x * torch.nan], ids=["another", "NaN"])
def test_results_that_are_wrong_are_found(which, wrong):
    def attend(*given):
        results = [*local.math(*given)]
        results[which] = wrong(results[which])
        return tuple(results)

    assert "where less than 0.1 is right" in trial.problem(attend, CPU, torch.float32, HEADS, lse=True)
    assert trial.problem(local.math, CPU, torch.float32, HEADS, lse=True) == ""


@pytest.mark.parametrize("known", [False, True], ids=["older torch", "newer"])
@pytest.mark.parametrize("name", ["_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"])
def test_a_capture_that_fails_is_ended(monkeypatch, name, known):
    """In torch's allocator, which else holds it for under way: the next capture would die of that."""
    ended = []

    def end(*given):
        ended.append(given)
        if known:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    @contextlib.contextmanager
    def graph(_, *, pool, capture_error_mode):
        assert pool == (0, 7)
        yield

    def waits(*given):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool", raising=False)
    monkeypatch.setattr(torch._C, name, end, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    given = UserList([None] * 3)
    given.device, given.shape = CUDA, (3, 1, 128, *HEADS)
    with pytest.raises(RuntimeError, match="^operation not permitted"):
        trial._replayed(waits, given, given)
    assert ended == [(CUDA.index, (0, 7))]


@pytest.mark.parametrize("ring", [False, True])
def test_what_no_graph_contains_is_not_taken(monkeypatch, ring):
    """As the kernels of SageAttention 2 in CUDA: that in Triton is, where the graph has it."""
    install(monkeypatch, "sage")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    outside = {*lossy.BACKENDS["sage"][0]}
    problem = "in a CUDA graph its error is nan"
    monkeypatch.setattr(trial, "problem", lambda attend, *_, **__: problem if attend in outside else "")
    assert local.choose("sage", CUDA, torch.bfloat16, HEADS, ring=ring) == ("sage", sage.sage_triton)
    outside.add(sage.sage_triton)
    with pytest.raises(ValueError, match="^install a sageattention .* or choose another .*: in a CUDA graph"):
        local.choose("sage", CUDA, torch.bfloat16, HEADS, ring=ring)


@pytest.fixture
def gpu(monkeypatch):
    """One of Hopper's, whose trials run on the CPU: what a graph has is tried on GPUs alone."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    tried = trial._tokens
    monkeypatch.setattr(trial, "_tokens", lambda *given: SimpleNamespace(to=lambda device: tried(*given)))
    monkeypatch.setattr(trial, "_on_gpu", trial._on_cpu)


def replaced(monkeypatch, module: str, name: str, check) -> None:
    """Has a function of a package call check(q, options) first."""
    function = getattr(sys.modules[module], name)

    @functools.wraps(function)
    def checked(q, *given, **options):
        check(q, options)
        return function(q, *given, **options)

    monkeypatch.setattr(sys.modules[module], name, checked)
    clear()


def test_what_is_tried_has_the_heads_that_will_be_attended(monkeypatch, gpu):
    """A package that was built for one head dim, or is wrong where heads are odd in number."""
    install(monkeypatch, "flash3-fp8")

    def check(q, options):
        assert q.shape[-1] != 64 and q.shape[2] % 2 == 0, "this build has no such heads"

    replaced(monkeypatch, "fa3_fwd_interface", "flash_attn_func", check)
    assert local.choose("flash3-fp8", CUDA, torch.bfloat16, (2, 128))[0] == "flash3-fp8"
    for heads in ((2, 64), (3, 128)):
        with pytest.raises(ValueError, match=f"with {heads[0]} heads of {heads[1]} values: this build has no such"):
            local.choose("flash3-fp8", CUDA, torch.bfloat16, heads)


def test_a_ring_tries_the_kernels_that_it_takes(monkeypatch, gpu):
    """With a log-sum-exp: what works without one may not do so with it, and the other way round."""
    for whole_works in (False, True):
        install(monkeypatch, "sage")

        def check(q, options, whole_works=whole_works):
            assert options.get("return_lse", False) != whole_works, "this build has no such kernel"

        replaced(monkeypatch, "sageattention", "sageattn", check)
        for ring in (False, True):
            chosen = local.choose("sage", CUDA, torch.bfloat16, HEADS, ring=ring)[1]
            first = sage.sage if ring else sage.sage_whole
            assert chosen == (first if ring != whole_works else sage.sage_triton)


def test_a_log_sum_exp_that_is_missing_is_found(monkeypatch, gpu):
    def attend(*given):
        return local.math(*given)[0], None

    assert trial.problem(attend, CPU, torch.float32, HEADS, lse=False) == ""
    install(monkeypatch, "sage")
    monkeypatch.setitem(lossy.BACKENDS, "sage", ((attend, attend),))
    assert local.choose("sage", CUDA, torch.bfloat16, HEADS)[1] is attend
    with pytest.raises(ValueError, match="^install a sageattention .*: it gives no log-sum-exp"):
        local.choose("sage", CUDA, torch.bfloat16, HEADS, ring=True)


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (2, 2)], ids=str)
def test_a_model_has_its_own_heads_tried(monkeypatch, layout):
    """Those of each rank, of the model's head dim."""
    asked = []
    monkeypatch.setattr(denoisers, "choose", lambda *given, ring: (asked.append((*given[3:], ring)), ("", None))[1])
    ulysses, ring = layout
    mesh = replace(single_rank_mesh(CPU), layout=Layout(ulysses=ulysses, ring=ring))
    for config in (SMALL, SMALL_SD3):
        Denoiser(config.build(), mesh, SimpleNamespace(generation=0), Settings(), torch.float32)
    dims = [config.hidden // config.heads for config in (SMALL, SMALL_SD3)]
    assert dims == [128, 64]
    assert asked == [
        ((config.heads // ulysses, dim), ring > 1) for config, dim in zip((SMALL, SMALL_SD3), dims, strict=True)
    ]
