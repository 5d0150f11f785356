"""Every formula of a weight patch against the same thing written out in float64, and what does not fit."""

import pytest
import torch
import torch.nn.functional as F
from formulas import IN, OUT, RANK, WEIGHT, W, assert_is, kronecker, outer, patched, rotations, tensors_of
from support import randn

from fastusp_backend.config import WeightPatch
from fastusp_backend.errors import RequestError
from fastusp_backend.weights.adapters import apply, check, low_rank

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (6.0, 2.0), (0.5, 0.5 / 3)])
def test_lora(alpha, scale):
    parts = tensors_of(up=(OUT, RANK), down=(RANK, IN))
    assert_is(patched("lora", parts, alpha=alpha), W + 0.7 * scale * outer(parts["up"], parts["down"]))


def test_lora_in_half_precision_is_computed_in_float32():
    parts = {role: t.to(torch.bfloat16) for role, t in tensors_of(up=(OUT, RANK), down=(RANK, IN)).items()}
    assert_is(patched("lora", parts), W + 0.7 * outer(parts["up"], parts["down"]))


def test_lora_of_a_convolution_with_mid():
    """up, mid and down are convolutions one after the other; the weight's kernel is 1 x 1 here."""
    parts = tensors_of(up=(OUT, RANK, 1, 1), down=(RANK, IN, 1, 1), mid=(RANK, RANK, 1, 1))
    x = torch.eye(IN, dtype=torch.float64)[:, :, None, None]
    for name in ("down", "mid", "up"):
        x = F.conv2d(x, parts[name].double())
    assert_is(patched("lora", parts, alpha=3.0), W + 0.7 * x[:, :, 0, 0].T)


def test_loha():
    parts = tensors_of(w1_a=(OUT, RANK), w1_b=(RANK, IN), w2_a=(OUT, RANK), w2_b=(RANK, IN))
    change = outer(parts["w1_a"], parts["w1_b"]) * outer(parts["w2_a"], parts["w2_b"])
    assert_is(patched("loha", parts, alpha=1.5), W + 0.7 * 0.5 * change)


def tucker(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sum over i, j of core[i, j] times row i of a and row j of b."""
    return a.double().T @ core[:, :, 0, 0].double() @ b.double()


def test_loha_with_cores():
    core = (RANK, RANK, 1, 1)
    parts = tensors_of(w1_a=(RANK, OUT), w1_b=(RANK, IN), w2_a=(RANK, OUT), w2_b=(RANK, IN), w1_t=core, w2_t=core)
    one, two = (tucker(parts[f"{w}_t"], parts[f"{w}_a"], parts[f"{w}_b"]) for w in ("w1", "w2"))
    assert_is(patched("loha", parts, alpha=1.5), W + 0.7 * 0.5 * one * two)


@pytest.mark.parametrize(
    ("first", "second", "scale"),
    [
        ({"w1": (4, 2)}, {"w2": (3, 4)}, 1.0),  # alpha counts only with a rank
        ({"w1": (4, 2)}, {"w2_a": (3, 2), "w2_b": (2, 4)}, 3.0),
        ({"w1_a": (4, 5), "w1_b": (5, 2)}, {"w2": (3, 4)}, 6.0 / 5),
        ({"w1_a": (4, 5), "w1_b": (5, 2)}, {"w2_a": (3, 2), "w2_b": (2, 4)}, 3.0),
        ({"w1": (4, 2)}, {"w2_a": (2, 3), "w2_b": (2, 4), "w2_t": (2, 2, 1, 1)}, 3.0),
    ],
)
def test_lokr(first, second, scale):
    parts = tensors_of(**first, **second)
    one = parts["w1"] if "w1" in parts else outer(parts["w1_a"], parts["w1_b"])
    two = parts.get("w2")
    if "w2_t" in parts:
        two = tucker(parts["w2_t"], parts["w2_a"], parts["w2_b"])
    elif two is None:
        two = outer(parts["w2_a"], parts["w2_b"])
    assert_is(patched("lokr", parts, alpha=6.0), W + 0.7 * scale * kronecker(one, two))


def test_glora():
    new = tensors_of(a1=(IN, RANK), a2=(RANK, IN), b1=(OUT, RANK), b2=(RANK, IN))
    change = W @ outer(new["a1"], new["a2"]) + outer(new["b1"], new["b2"])
    assert_is(patched("glora", new, alpha=6.0), W + 0.7 * 2.0 * change)
    old = tensors_of(a1=(RANK, IN), a2=(IN, RANK), b1=(RANK, IN), b2=(OUT, RANK))
    change = W @ outer(old["a2"], old["a1"]) + outer(old["b2"], old["b1"])
    assert_is(patched("glora", old, alpha=6.0), W + 0.7 * 2.0 * change)


@pytest.mark.parametrize("alpha", [None, 0.0, 1.5, 1000.0])
def test_oft(alpha):
    """Strength counts twice, a scale of rows not at all, as in ComfyUI."""
    parts = tensors_of(blocks=(3, 4, 4), rescale=(OUT, 1))
    turned = torch.block_diag(*(r.T for r in rotations(parts["blocks"], alpha or 0.0))) @ W
    assert_is(patched("oft", parts, alpha=alpha), W + 0.7**2 * (turned - W))


@pytest.mark.parametrize(("strength", "alpha"), [(1.0, 0.0), (0.7, 0.0), (-0.5, 1.5)])
@pytest.mark.parametrize("rescaled", [False, True])
def test_boft(strength, alpha, rescaled):
    """Three stages for 16 rows in 4 blocks of 4: in stage i, a block has 2 pairs of rows that lie 2^(i + 1) apart."""
    weight, parts = randn(16, IN, seed=9), tensors_of(blocks=(3, 4, 4, 4), rescale=(16, 1))
    if not rescaled:
        del parts["rescale"]
    turns, eye = rotations(parts["blocks"], alpha), torch.eye(4, dtype=torch.float64)
    turned = weight.double()
    for stage in range(3):
        apart, before = 2 ** (stage + 1), turned.clone()
        pairs = [(row, row + apart) for row in range(16) if row // apart % 2 == 0]
        for block in range(4):
            rows = [row for pair in pairs[2 * block : 2 * block + 2] for row in pair]
            turn = strength * turns[4 * stage + block] + (1 - strength) * eye
            turned[rows] = turn @ before[rows]
    turned = turned * parts["rescale"].double() if rescaled else turned
    want = weight.double() + strength * (turned - weight.double())
    assert_is(patched("boft", parts, weight, alpha=alpha, strength=strength), want)


def test_widening():
    """Zeros come behind the weight, then the patch; what follows finds the wider weight."""
    parts, wide = tensors_of(up=(OUT, RANK), down=(RANK, IN + 5)), F.pad(W, (0, 5))
    want = wide + 0.7 * outer(parts["up"], parts["down"])
    assert_is(patched("lora", parts, reshape=(OUT, IN + 5)), want)
    assert_is(patched("lora", parts, wide.float(), reshape=(OUT, IN + 5)), want)
    diff = tensors_of(diff=(OUT + 1, IN + 5))
    assert_is(patched("diff", diff, reshape=(OUT + 1, IN + 5)), F.pad(wide, (0, 0, 0, 1)) + 0.7 * diff["diff"].double())
    assert torch.equal(WEIGHT.double(), W)


def test_diff_and_set():
    parts = tensors_of(diff=(OUT, IN))
    assert_is(patched("diff", parts), W + 0.7 * parts["diff"].double())
    bias = tensors_of(diff=(OUT,))
    assert_is(patched("diff", bias, WEIGHT[:, 0]), W[:, 0] + 0.7 * bias["diff"].double())
    value = tensors_of(value=(OUT, IN))
    assert torch.equal(patched("set", value), value["value"])


def test_a_slice_halves_and_the_strength_of_the_weight():
    parts = tensors_of(up=(4, RANK), down=(RANK, IN))
    change, want = outer(parts["up"], parts["down"]), W.clone()
    want[4:8] = 0.5 * want[4:8] + 0.7 * change
    assert_is(patched("lora", parts, offset=(0, 4, 4), strength_model=0.5), want)
    whole = tensors_of(diff=(OUT, IN))
    swapped = torch.cat([whole["diff"][OUT // 2 :], whole["diff"][: OUT // 2]]).double()
    assert_is(patched("diff", whole, swap_halves=True), W + 0.7 * swapped)


F32 = {"dtype": torch.float32, "device": torch.device("cpu")}


def test_factors_of_a_stack_are_its_sum():
    convolution = tensors_of(up=(OUT, RANK, 1, 1), down=(RANK, IN, 1, 1), mid=(RANK, RANK, 1, 1))
    stack = (
        (tensors_of(up=(OUT, RANK), down=(RANK, IN)), {"alpha": 6.0}),
        (tensors_of(up=(4, 2), down=(2, IN)), {"offset": (0, 5, 4), "swap_halves": True, "strength": -0.3}),
        (tensors_of(up=(OUT, 1), down=(1, 3)), {"offset": (1, 4, 3)}),
        (convolution, {"alpha": 1.0}),
        (tensors_of(up=(OUT, 5), down=(5, IN)), {"swap_halves": True}),
    )
    want, patches, tensors = WEIGHT.clone(), [], {}
    for number, (parts, more) in enumerate(stack):
        roles = {role: f"{role}{number}" for role in parts}
        patches.append(WeightPatch(kind="lora", tensors=roles, **({"strength": 0.7} | more)))
        tensors |= {roles[role]: tensor for role, tensor in parts.items()}
        apply(want, patches[-1], tensors)
    up, down = low_rank(patches, tensors, (OUT, IN), **F32)
    assert up.shape == (OUT, 14) and down.shape == (14, IN)
    torch.testing.assert_close(WEIGHT + up @ down, want)
    halves = low_rank(patches, tensors, (OUT, IN), **(F32 | {"dtype": torch.bfloat16}))
    assert torch.equal(halves[0], up.bfloat16()) and torch.equal(halves[1], down.bfloat16())


@pytest.mark.parametrize(
    ("kind", "shapes", "more", "words"),
    [
        ("loha", {"w1_a": (OUT, 2), "w1_b": (2, IN), "w2_a": (OUT, 2), "w2_b": (2, IN)}, {}, "not LoHa patches"),
        ("lokr", {"w1": (4, 2), "w2": (3, 4)}, {}, "not LoKr patches"),
        ("glora", {"a1": (IN, 2), "a2": (2, IN), "b1": (OUT, 2), "b2": (2, IN)}, {}, "not GLoRA patches"),
        ("lora", {"up": (OUT, 3), "down": (3, IN), "dora_scale": (OUT, 1)}, {}, "not DoRA patches"),
        ("diff", {"diff": (OUT, IN)}, {}, "not diff patches"),
        ("set", {"value": (OUT, IN)}, {}, "not set patches"),
        ("oft", {"blocks": (3, 4, 4)}, {}, "not OFT patches"),
        ("lora", {"up": (OUT, 3), "down": (3, IN)}, {"strength_model": 0.5}, "not strength_model 0.5"),
        (
            "lora",
            {"up": (OUT, 3), "down": (3, 9)},
            {"reshape": (OUT, 9)},
            "not one that widens a matrix .12, 8. to .12, 9.",
        ),
        ("lora", {"up": (IN, 3), "down": (3, OUT)}, {}, "not factors .8, 3., .3, 12. for a matrix .12, 8."),
    ],
)
def test_what_has_no_factors_is_refused_by_name(kind, shapes, more, words):
    patch = WeightPatch(kind=kind, tensors={role: role for role in shapes}, strength=1.0, **more)
    check(patch, tensors_of(**shapes), (OUT, IN))
    with pytest.raises(RequestError, match=f"packed weights.*{words}; set weight_dtype .* bf16"):
        low_rank([patch], tensors_of(**shapes), (OUT, IN), **F32)


@pytest.mark.parametrize(
    ("kind", "shapes", "more", "words"),
    [
        ("lora", {"up": (OUT, 3), "down": (2, IN)}, {}, "lora patch .up .12, 3., down .2, 8.. does not fit"),
        ("lora", {"up": (OUT, 3), "down": (3, IN + 1)}, {}, "weight of shape .12, 8."),
        ("lora", {"up": (OUT, 3), "down": (3, IN)}, {"offset": (0, 4, 20)}, "slice .0, 4, 20."),
        ("lora", {"up": (OUT, 3)}, {}, "has no 'down'"),
        ("diff", {"diff": (1, IN)}, {}, "does not fit"),
        ("set", {"value": (5, IN)}, {}, "does not fit"),
        ("lokr", {"w1": (4, 2)}, {}, "has no 'w2_a'"),
        ("oft", {"blocks": (5, 2, 2)}, {}, "oft patch .blocks .5, 2, 2.. does not fit"),
        ("oft", {"blocks": (3, 4, 2)}, {}, "does not fit"),
        ("boft", {"blocks": (2, 3, 4, 4)}, {}, "has no 'alpha'"),
        ("boft", {"blocks": (3, 3, 4, 4)}, {"alpha": 0.0}, "does not fit"),
        ("lora", {"up": (OUT, 3), "down": (3, 9)}, {"reshape": (OUT, 10)}, "to be widened to .12, 10."),
        ("lora", {"up": (OUT, 3), "down": (3, 5)}, {"reshape": (OUT, 5)}, "does not fit"),
        ("lora", {"up": (OUT, 3), "down": (3, 9)}, {"reshape": (OUT, 9), "offset": (0, 0, OUT)}, "does not fit"),
        ("lora", {"up": (OUT, 3), "down": (3, IN)}, {"reshape": (OUT, IN, 1)}, "does not fit"),
        ("lora", {"up": (OUT, 3), "down": (3, IN), "dora_scale": (5, 1)}, {}, "does not fit"),
    ],
)
def test_what_does_not_fit_is_named(kind, shapes, more, words):
    with pytest.raises(RequestError, match=words):
        patched(kind, tensors_of(**shapes), **more)


def test_a_tensor_that_did_not_come_is_named():
    patch = WeightPatch(kind="diff", tensors={"diff": "7f"}, strength=1.0)
    with pytest.raises(RequestError, match="lacks tensor '7f'"):
        check(patch, {}, (OUT, IN))
