"""Every kind of patch as a DoRA, against the same thing written out in float64."""

import pytest
import torch
from formulas import IN, OUT, RANK, W, assert_is, kronecker, outer, patched, rotations, tensors_of

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("strength", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_dora(strength, axis):
    shape = (OUT, 1) if axis == "rows" else (1, IN)
    parts = tensors_of(up=(OUT, RANK), down=(RANK, IN), dora_scale=shape)
    changed = W + 2.0 * outer(parts["up"], parts["down"])
    if axis == "rows":
        lengths = torch.stack([row.square().sum().sqrt() for row in W])[:, None]
    else:
        lengths = torch.stack([column.square().sum().sqrt() for column in changed.T])
    want = changed * parts["dora_scale"].double() / lengths
    assert_is(patched("lora", parts, alpha=6.0, strength=strength), W + strength * (want - W))


def lengthened(changed: torch.Tensor, magnitude: torch.Tensor, strength: float) -> torch.Tensor:
    """A DoRA of rows: each takes the length `magnitude` relative to that of the weight's own row."""
    lengths = torch.stack([row.square().sum().sqrt() for row in W])[:, None]
    return W + strength * (changed * magnitude.double() / lengths - W)


def test_dora_of_other_kinds():
    """Each change at its own scale, then the lengths; the strength counts once, for both."""
    loha = tensors_of(w1_a=(OUT, RANK), w1_b=(RANK, IN), w2_a=(OUT, RANK), w2_b=(RANK, IN), dora_scale=(OUT, 1))
    change = 0.5 * outer(loha["w1_a"], loha["w1_b"]) * outer(loha["w2_a"], loha["w2_b"])
    assert_is(patched("loha", loha, alpha=1.5), lengthened(W + change, loha["dora_scale"], 0.7))
    lokr = tensors_of(w1=(4, 2), w2_a=(3, 2), w2_b=(2, 4), dora_scale=(OUT, 1))
    change = 3.0 * kronecker(lokr["w1"], outer(lokr["w2_a"], lokr["w2_b"]))
    assert_is(patched("lokr", lokr, alpha=6.0), lengthened(W + change, lokr["dora_scale"], 0.7))
    glora = tensors_of(a1=(IN, RANK), a2=(RANK, IN), b1=(OUT, RANK), b2=(RANK, IN), dora_scale=(OUT, 1))
    change = 2.0 * (W @ outer(glora["a1"], glora["a2"]) + outer(glora["b1"], glora["b2"]))
    assert_is(patched("glora", glora, alpha=6.0), lengthened(W + change, glora["dora_scale"], 0.7))


@pytest.mark.parametrize("alpha", [None, 0.0, 1.5])
def test_dora_of_rotations(alpha):
    """The constraint is the change's scale as well, none is 0, and the strength counts twice, as in ComfyUI."""
    oft = tensors_of(blocks=(3, 4, 4), dora_scale=(OUT, 1))
    turned = torch.block_diag(*(r.T for r in rotations(oft["blocks"], alpha or 0.0))) @ W
    change = (alpha or 0.0) * 0.7 * (turned - W)
    assert_is(patched("oft", oft, alpha=alpha), lengthened(W + change, oft["dora_scale"], 0.7))
    if alpha is None:
        return  # ComfyUI leaves out a BOFT without
    boft = tensors_of(blocks=(1, 3, 4, 4), dora_scale=(OUT, 1))
    turned, apart = W.clone(), 2
    pairs = [(row, row + apart) for row in range(OUT) if row // apart % 2 == 0]
    for block, turn in enumerate(rotations(boft["blocks"], alpha)):
        rows = [row for pair in pairs[2 * block : 2 * block + 2] for row in pair]
        turned[rows] = (0.7 * turn + 0.3 * torch.eye(4, dtype=torch.float64)) @ W[rows]
    assert_is(patched("boft", boft, alpha=alpha), lengthened(W + alpha * (turned - W), boft["dora_scale"], 0.7))
