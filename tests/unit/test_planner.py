"""Every layout that ranks and heads allow can be had, every other is refused with a list of the legal ones."""

import pytest

from fastusp_backend.config import Layout
from fastusp_backend.errors import LayoutError
from fastusp_backend.planner import legal_layouts, plan, plan_batches

pytestmark = pytest.mark.unit

RANKS = (1, 2, 3, 4, 5, 6, 7, 8)
HEADS = (1, 3, 4, 24)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("ranks", RANKS)
def test_every_wish_is_honoured_or_refused(ranks, heads):
    legal = {(u, ranks // u) for u in range(1, ranks + 1) if ranks % u == 0 and heads % u == 0}
    assert {(x.ulysses, x.ring) for x in legal_layouts(ranks, heads)} == legal
    for ulysses in range(ranks + 2):
        for ring in range(ranks + 2):
            fitting = [x for x in legal if ulysses in (0, x[0]) and ring in (0, x[1])]
            if fitting:
                layout = plan(ranks, heads, ulysses=ulysses, ring=ring)
                assert (layout.ulysses, layout.ring) == max(fitting)
                continue
            with pytest.raises(LayoutError) as refusal:
                plan(ranks, heads, ulysses=ulysses, ring=ring)
            text = str(refusal.value)
            for u, r in legal:
                assert f"ulysses {u} x ring {r}" in text
            assert f"ulysses = {ulysses}" in text or not ulysses
            assert f"ring = {ring}" in text or not ring


def test_ulysses_comes_first():
    assert plan(8, 24) == Layout(ulysses=8, ring=1)
    assert plan(4, 4) == Layout(ulysses=4, ring=1)
    assert plan(3, 4) == Layout(ulysses=1, ring=3)
    assert plan(6, 4) == Layout(ulysses=2, ring=3)


@pytest.mark.parametrize(
    "wish, reason",
    [
        ({"ulysses": 2, "ring": 3}, "ulysses x ring = 6 is not the number of ranks, 4"),
        ({"ulysses": 3}, "does not divide the number of ranks, 4"),
        ({"ring": 3}, "does not divide the number of ranks, 4"),
        ({"ulysses": 4}, "a Ulysses degree of 4 does not divide the model's 2 attention heads"),
        ({"ring": 1}, "a Ulysses degree of 4 does not divide the model's 2 attention heads"),
    ],
)
def test_the_reason_is_told(wish, reason):
    with pytest.raises(LayoutError, match=reason):
        plan(4, 2, **wish)


@pytest.mark.parametrize("ulysses, ring", [(0, 1), (1, 0), (-1, -1), (2, -1)])
def test_a_layout_has_positive_degrees(ulysses, ring):
    with pytest.raises(LayoutError, match="at least 1"):
        Layout(ulysses=ulysses, ring=ring)


@pytest.mark.parametrize(
    "ranks, wish, expected",
    [
        (1, {}, ["ulysses 1 x ring 1"]),
        (2, {}, ["batch 2 x ulysses 1 x ring 1", "ulysses 2 x ring 1"]),
        (3, {}, ["batch 3 x ulysses 1 x ring 1", "ulysses 3 x ring 1"]),
        (
            4,
            {},
            ["batch 4 x ulysses 1 x ring 1", "batch 2 x ulysses 2 x ring 1", "ulysses 4 x ring 1"],
        ),
        (4, {"batch_parallel": "off"}, ["ulysses 4 x ring 1"]),
        (4, {"ulysses": 2, "ring": 2}, ["ulysses 2 x ring 2"]),
        (4, {"ulysses": 2}, ["batch 2 x ulysses 2 x ring 1", "ulysses 2 x ring 2"]),
        (4, {"ring": 2, "batch_parallel": "on"}, ["batch 2 x ulysses 1 x ring 2", "ulysses 4 x ring 1"]),
    ],
)
def test_layouts_with_batch_groups(ranks, wish, expected):
    assert [str(x) for x in plan_batches(ranks, 24, **wish)] == expected


@pytest.mark.parametrize("ranks, wish", [(3, {}), (4, {"ulysses": 4}), (1, {}), (4, {"ulysses": 2, "ring": 2})])
def test_batch_groups_that_cannot_be_had_are_refused(ranks, wish):
    with pytest.raises(LayoutError):
        plan_batches(ranks, 24, batch_parallel="on", **wish)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"batch_parallel": "sometimes"}, "^Set batch_parallel to one of auto, on, off, not 'sometimes'"),
        ({"batch_parallel": ""}, "^Set batch_parallel to one of auto, on, off, not ''"),
        ({"ulysses": -1}, "^Set degrees of at least 1, or 0, .* not ulysses = -1 and ring = 0"),
        ({"ring": -2, "ulysses": -1, "batch_parallel": "on"}, "not ulysses = -1 and ring = -2"),
        ({"ulysses": 65}, "ulysses = 65 cannot be used on 2 ranks"),
        ({"ulysses": 2, "batch_parallel": "on"}, "on 1 ranks, .* \\(of each of the two groups"),
    ],
)
def test_values_that_nobody_offers_are_refused(wish, words):
    with pytest.raises(LayoutError, match=words):
        plan_batches(2, 24, **wish)


def test_ulysses_stays_inside_a_machine():
    """A ring goes between machines, unless batch groups do, or somebody wants it otherwise."""
    assert [str(x) for x in legal_layouts(4, 24, 2)] == [
        "ulysses 2 x ring 2",
        "ulysses 1 x ring 4",
        "ulysses 4 x ring 1",
    ]
    assert plan(2, 24, per_machine=1) == Layout(ulysses=1, ring=2)
    assert plan(2, 24, ulysses=2, per_machine=1) == Layout(ulysses=2, ring=1)
    assert plan(8, 24, per_machine=4) == Layout(ulysses=4, ring=2) and plan(8, 24) == Layout(ulysses=8, ring=1)
    assert plan_batches(4, 24, per_machine=2) == (
        Layout(ulysses=1, ring=1, batch=4),
        Layout(ulysses=2, ring=1, batch=2),
        Layout(ulysses=2, ring=2),
    )
