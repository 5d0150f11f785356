"""Which queries FlashAttention-3 attends in parts of the keys, and that the parts are all of it. The package's operator
is played; tests/gpu/test_flash3.py has the real one."""

import math

import attention_packages
import pytest
import torch
from support import randn, relative_difference

from fastusp_backend.attention import flash3, local, trial
from fastusp_backend.attention.rounds import split

pytestmark = pytest.mark.unit

CUDA = torch.device("cuda", 0)
SCALE = 128**-0.5


@pytest.mark.parametrize(
    ("heads", "queries", "keys", "found"),  # as measured on an H200: rounds.py
    [
        (12, 4608, 4608, (4224, 3)),
        (12, 4352, 4352, (4224, 8)),
        (12, 2048, 4608, (1408, 2)),
        (12, 8704, 16896, (8448, 5)),
        (6, 4608, 4608, (4608, 1)),
        (3, 4608, 4608, (4608, 1)),
        (24, 4608, 4608, (4608, 1)),
        (12, 2560, 4608, (2560, 1)),
        (12, 8192, 16896, (8192, 1)),
        (12, 16896, 16896, (16896, 1)),
        (12, 77, 4608, (0, 8)),  # not measured
    ],
)
def test_parts_are_taken_where_they_were_faster(heads, queries, keys, found):
    assert split(queries, keys, heads, 132) == found


@pytest.mark.parametrize("units", [78, 114, 132])
@pytest.mark.parametrize("heads", [1, 5, 12, 19, 24, 38])
def test_never_more_rounds_than_in_one_call(heads, units):
    for queries in range(100, 9000, 457):
        whole, parts = split(queries, queries, heads, units)
        if parts == 1:
            assert whole == queries
            continue
        assert whole % 128 == 0 and 0 <= whole < queries
        tiles = [-(-rows // 128) * heads for rows in (whole, queries - whole, queries)]
        rounds = math.ceil(tiles[0] / units) + math.ceil(tiles[1] * parts / units) / parts
        assert rounds < math.ceil(tiles[2] / units)


class Operator:
    """fa3_fwd::fwd, for queries and keys of either kind. calls: (queries, parts)."""

    def __init__(self):
        self.calls = []

    def __call__(self, q, k, v, *, out, softmax_scale, num_splits, q_descale=None, k_descale=None, v_descale=None):
        self.calls.append((q.shape[1], num_splits))
        scales = (q_descale, k_descale, v_descale)
        wide = [
            x.float() if s is None else x.float() * s[:, None, :, None] for x, s in zip((q, k, v), scales, strict=True)
        ]
        out.copy_(local.math(*wide, softmax_scale)[0])


@pytest.fixture
def operator(monkeypatch):
    """The operator, on what has the multiprocessors of four tiles."""
    attention_packages.install(monkeypatch, "flash3-fp8")
    made = Operator()
    monkeypatch.setattr(flash3, "_operator", lambda: made)
    monkeypatch.setattr(flash3, "_units", lambda device: 4)
    yield made
    attention_packages.clear()


@pytest.mark.parametrize("attend", [flash3.flash3_split, flash3.flash3_fp8_split], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("queries, calls", [(1300, [(1024, 1), (276, 2)]), (1024, [(1024, 1)])])
@pytest.mark.parametrize("images", [1, 2])
def test_all_queries_are_attended(operator, monkeypatch, attend, images, queries, calls):
    monkeypatch.setattr(flash3, "split", lambda *given: calls[0] if len(calls) == 1 else (1024, 2))
    q, k, v = (randn(images, n, 3, 128, seed=i).bfloat16() for i, n in enumerate((queries, 500, 500)))
    out, lse = attend(q, k, v, SCALE)
    assert operator.calls == calls and lse is None and out.dtype == torch.bfloat16
    expected = local.math(q.float(), k.float(), v.float(), SCALE)[0]
    assert relative_difference(out.float(), expected) < (5e-3 if attend is flash3.flash3_split else 8e-2)


def test_the_heads_of_all_images_fill_a_round(operator, monkeypatch):
    given = []
    monkeypatch.setattr(flash3, "split", lambda *of: given.append(of) or (of[0], 1))
    q, k = (torch.zeros(2, n, 3, 128, dtype=torch.bfloat16) for n in (200, 300))
    flash3.flash3_split(q, k, k, SCALE)
    assert given == [(200, 300, 6, 4)]


@pytest.fixture
def hopper(monkeypatch):
    """A GPU on which packages work, but those functions of theirs that are in `wrong`."""
    wrong = set()
    monkeypatch.setattr(trial, "problem", lambda attend, *_, **__: "no" if attend in wrong else "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash3, "installed", lambda: True)
    return wrong


@pytest.mark.parametrize(
    ("choice", "whole", "in_two", "of_parts"),
    [
        ("auto", local.hopper_split, flash3.parts_of_keys, local.hopper),
        ("flash3", flash3.flash3_split, flash3.parts_of_keys, flash3.flash3),
        ("flash3-fp8", flash3.flash3_fp8_split, flash3.parts_of_keys_fp8, flash3.flash3_fp8),
    ],
)
def test_parts_need_a_package_that_joins_them(hopper, choice, whole, in_two, of_parts):
    """And nobody who asks for a log-sum-exp, and heads for which it was measured."""

    def chosen(dim: int = 128, *, ring: bool = False):
        return local.choose(choice, CUDA, torch.bfloat16, (12, dim), ring=ring)[1]

    assert chosen() is whole and chosen(ring=True) is chosen(64) is of_parts
    hopper.add(in_two)
    assert chosen() is of_parts


def test_the_kernel_that_leads_is_taken_with_parts(monkeypatch):
    called = []
    monkeypatch.setattr(flash3, "flash3_split", lambda *_: called.append("flash3"))
    monkeypatch.setattr(local, "cudnn", lambda *_: called.append("cudnn"))
    for leads in (True, False):
        monkeypatch.setattr(flash3, "leads", lambda *_, leads=leads: leads)
        local.hopper_split(None, None, None, 1.0)
    assert called == ["flash3", "cudnn"]


@pytest.mark.parametrize(
    ("schema", "lacks"),
    [
        (
            "(Tensor q, Tensor? out=None, Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
            "float? softmax_scale=None, int num_splits=0) -> Tensor",
            "",
        ),
        ("(Tensor q, float? softmax_scale=None) -> Tensor", "has no k_descale, num_splits, out, q_descale, v_descale"),
        (None, "fwd"),
    ],
    ids=["today's", "older", "none"],
)
def test_an_older_operator_is_told(monkeypatch, schema, lacks):
    attention_packages.install(monkeypatch, "flash3-fp8")
    library = torch.library.Library("fastusp_test_rounds", "FRAGMENT")
    try:
        if schema:
            library.define(f"fwd{schema}")
        monkeypatch.setitem(flash3._MODULES, "fa3_fwd_interface", "fastusp_test_rounds")
        if not lacks:
            assert flash3._operator() is torch.ops.fastusp_test_rounds.fwd
            return
        with pytest.raises(AttributeError, match=lacks):
            flash3._operator()
        assert not flash3.can_split(torch.device("cpu"), (3, 128), eight=False)
    finally:
        library._destroy()
        vars(torch.ops).pop("fastusp_test_rounds", None)
        attention_packages.clear()


@pytest.mark.parametrize("eight", [False, True], ids=["bf16", "e4m3"])
def test_a_package_that_loses_parts_is_found(operator, monkeypatch, eight):
    """Of the keys' parts it attends the first alone; a part is some tiles of 176 or 224 keys."""

    def first_alone(q, k, v, *, num_splits, **options):
        keys = 256 if num_splits > 1 else k.shape[1]
        operator(q, k[:, :keys], v[:, :keys], num_splits=1, **options)

    assert flash3.can_split(torch.device("cpu"), (3, 128), eight=eight)
    trial.problem.cache_clear()
    monkeypatch.setattr(flash3, "_operator", lambda: first_alone)
    assert not flash3.can_split(torch.device("cpu"), (3, 128), eight=eight)
