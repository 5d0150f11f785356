"""Patches from odd adapter files: what passes the check can be applied, everything else is refused as a request; a
rank that fails while it patches takes the pool along."""

import random
from collections import Counter

import pytest
import torch

from fastusp_backend.config import WeightPatch
from fastusp_backend.errors import RequestError
from fastusp_backend.weights.adapters import apply, check, low_rank

pytestmark = pytest.mark.unit

OUT, IN = 12, 8
CPU = torch.device("cpu")


def patch_of(kind: str, parts, **more) -> WeightPatch:
    return WeightPatch(kind=kind, tensors={role: role for role in parts}, **({"strength": 1.0} | more))


def lora(rank: int = 3, **other: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"up": torch.ones(OUT, rank), "down": torch.ones(rank, IN)} | other


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("lora", lora(0)),
        ("lora", {"up": torch.ones(OUT, 0, 1, 1), "down": torch.ones(0, IN, 1, 1)}),
        ("loha", {f"w{n}_{x}": torch.ones(s) for n in "12" for x, s in (("a", (OUT, 0)), ("b", (0, IN)))}),
        ("lokr", {"w1": torch.ones(4, 2), "w2_a": torch.ones(3, 0), "w2_b": torch.ones(0, 4)}),
        (
            "glora",
            {"a1": torch.ones(IN, 0), "a2": torch.ones(0, IN), "b1": torch.ones(OUT, 0), "b2": torch.ones(0, IN)},
        ),
    ],
)
def test_a_rank_of_zero(kind, parts):
    """It adds nothing, and has no alpha: by what would it be divided?"""
    weight = torch.ones(OUT, IN)
    plain = patch_of(kind, parts)
    assert check(plain, parts, (OUT, IN)) == (OUT, IN)
    assert torch.equal(apply(weight.clone(), plain, parts), weight)
    with pytest.raises(RequestError, match=f"the {kind} patch .* 0.* does not fit"):
        check(patch_of(kind, parts, alpha=1.0), parts, (OUT, IN))


@pytest.mark.parametrize("name", ["alpha", "strength", "strength_model"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none(name, value):
    """They would make every weight NaN, without a word."""
    with pytest.raises(RequestError, match=f"the lora patch's {name} is {value}"):
        check(patch_of("lora", lora(), **{name: value}), lora(), (OUT, IN))


@pytest.mark.parametrize(
    ("odd", "what"),
    [
        (torch.ones(OUT, 3, dtype=torch.complex64), "torch.complex64"),
        (torch.ones(OUT, 3, dtype=torch.uint16), "torch.uint16"),
        (torch.empty(OUT, 3, dtype=torch.bits8), "torch.bits8"),
        (torch.ones(OUT, 3).to_sparse(), "torch.float32"),
        ("a text", "str"),
        (4.0, "float"),
        (None, "NoneType"),
    ],
    ids=["complex", "uint16", "bits", "sparse", "text", "number", "nothing"],
)
def test_tensors_that_are_none(odd, what):
    parts = lora(up=odd)
    with pytest.raises(RequestError, match=f"the lora patch's 'up' is {what}, expected a tensor of plain numbers"):
        check(patch_of("lora", parts), parts, (OUT, IN))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e5m2, torch.int8, torch.bool, torch.int64])
def test_types_may_differ(dtype):
    parts = lora(up=torch.ones(OUT, 3).to(dtype))
    check(patch_of("lora", parts), parts, (OUT, IN))
    assert torch.equal(apply(torch.zeros(OUT, IN), patch_of("lora", parts), parts), torch.full((OUT, IN), 3.0))


def fitting(rank: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes that fit a weight (OUT, IN), by kind and role."""
    a, b = (OUT, rank), (rank, IN)
    return {
        "lora": {"up": a, "down": b, "mid": (rank, rank, 1, 1), "dora_scale": (OUT, 1)},
        "loha": {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b, "w1_t": (rank, rank, 1, 1), "dora_scale": (1, IN)},
        "lokr": {
            "w1": (4, 2),
            "w2": (3, 4),
            "w1_a": (4, rank),
            "w1_b": (rank, 2),
            "w2_a": (3, rank),
            "w2_b": (rank, 4),
        },
        "glora": {"a1": (IN, rank), "a2": (rank, IN), "b1": a, "b2": b, "dora_scale": (OUT,)},
        "oft": {"blocks": (3, 4, 4), "rescale": (OUT, 1), "dora_scale": (OUT, 1)},
        "boft": {"blocks": (2, 3, 4, 4), "rescale": (OUT, 1)},
        "diff": {"diff": (OUT, IN)},
        "set": {"value": (OUT, IN)},
    }


@pytest.mark.any_processor
@pytest.mark.filterwarnings("ignore:Tensor.mT")
def test_what_passes_the_check_can_be_applied():
    chance, seen = random.Random(0), Counter()
    optional = ("mid", "dora_scale", "rescale", "w1_t", "w1_a", "w2_a", "w1", "w2")
    for _ in range(1200):
        kind, shapes = chance.choice(list(fitting(chance.choice((0, 1, 3))).items()))
        shapes = {role: shape for role, shape in shapes.items() if role not in optional or chance.random() < 0.6}
        for role in list(shapes):
            if chance.random() < 0.1:
                shapes[role] = tuple(chance.choice((0, 1, 2, 3, OUT, IN)) for _ in range(chance.randrange(6)))
        parts = {role: torch.ones(shape) for role, shape in shapes.items()}
        more = {"alpha": chance.choice((None, 0.0, 1.0, -1e300)), "swap_halves": chance.random() < 0.1}
        if chance.random() < 0.2:
            more["offset"] = tuple(chance.choice((-1, 0, 1, 4, 20)) for _ in range(3))
        if chance.random() < 0.2:
            more["reshape"] = chance.choice(((OUT, IN + 1), (OUT,), (1 << 40, 1 << 40), (OUT, -1), (), (OUT, IN)))
        shape = chance.choice(((OUT, IN), (OUT, IN), (OUT,), (1, 1)))
        patch = patch_of(kind, parts, **more)
        try:
            wide = check(patch, parts, shape)
        except RequestError:
            seen["refused"] += 1
            continue
        if len(wide) == 2 and wide[0] > OUT:
            continue  # it fits, and takes a yottabyte; `FamilyConfig.reshaped` refuses it
        assert tuple(apply(torch.ones(shape), patch, parts).shape) == wide
        seen[kind] += 1
        if len(shape) == 2:
            try:
                low_rank([patch], parts, shape, dtype=torch.float32, device=CPU)
            except RequestError:
                seen["no factors"] += 1
    assert len(seen) == 10 and seen["lora"] > 20, seen
