"""Segments of a stream whose tokens take modulations of several rows equal one row's, token by token."""

import pytest
import torch
import torch.nn.functional as F
from support import randn, relative_difference

from fastusp_backend.kernels.sandwich import EPS
from fastusp_backend.models.layers import Linear, RMSNorm
from fastusp_backend.models.segments import Segments

pytestmark = pytest.mark.unit

ROWS = torch.tensor([0, 0, 1, 0, 1])


def written_out(name: str, x, *rest) -> tuple[torch.Tensor, ...]:
    """A segment of one token, (C,) each, in float64: what it returns."""
    x, *rest = (t.double() for t in (x, *rest))
    if name != "norm":
        y, gate, *rest = rest
        x = x + gate * y
    if name == "add":
        return (x,)
    shift, scale = rest
    centred = x - x.mean()
    normed = (1 + scale) * centred / (centred.square().mean() + 1e-6).sqrt() + shift
    return (normed,) if name == "norm" else (x, normed)


@pytest.mark.parametrize("name, streams, modulations", [("norm", 1, 2), ("add", 2, 1), ("add_norm", 2, 3)])
@pytest.mark.parametrize("rows", [1, 2])
def test_rows(name, streams, modulations, rows):
    """Each token takes its own row; modulations of one row are all tokens'."""
    by_row = Segments(torch.device("cpu"), fused=False).by_row(ROWS)
    x = [randn(2, 5, 8, seed=n) for n in range(streams)]
    given = [randn(2, rows, 8, seed=10 + n) for n in range(modulations)]
    got = getattr(by_row, name)(*x, *given)
    for item in range(2):
        for token, row in enumerate(ROWS.tolist()):
            own = (m[item, row if rows > 1 else 0] for m in given)
            expected = written_out(name, *(part[item, token] for part in x), *own)
            for mine, wanted in zip(got if name == "add_norm" else (got,), expected, strict=True):
                torch.testing.assert_close(mine[item, token].double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_image_is_the_last_of_the_tokens():
    """FLUX.2 runs the image's tokens alone, then all of them."""
    by_row = Segments(torch.device("cpu"), fused=False).by_row(ROWS)
    x, shift, scale = randn(2, 5, 8, seed=0), *(randn(2, 2, 8, seed=1 + n) for n in range(2))
    assert torch.equal(by_row.norm(x[:, 2:], shift, scale), by_row.norm(x, shift, scale)[:, 2:])


@pytest.mark.parametrize("fp8", [False, True])
def test_a_gated_mlp(fp8):
    """silu of the first half of a layer's outputs times the second, for a part of its rows."""
    segments, layer = Segments(torch.device("cpu"), fused=False, fp8=fp8), Linear(8, 22, bias=False)
    layer.weight.data = randn(22, 8, seed=0)
    x, rows = randn(2, 5, 8, seed=1), slice(10, None)
    wide = x.double() @ layer.weight.data[rows].double().T
    expected = wide[..., :6] / (1 + (-wide[..., :6]).exp()) * wide[..., 6:]
    if fp8:
        layer.stored = layer.stored.by_rows()
        got = segments.mlp_in(layer, segments.activations(x), rows, gated=True)
        assert got.dtype == torch.float32 and got.values.dtype == torch.float8_e4m3fn
        got = got.values.double() * got.scales.double()
    else:
        got = segments.mlp_in(layer, x, rows, gated=True).double()
    assert relative_difference(got, expected) < (0.2 if fp8 else 1e-6)


@pytest.mark.parametrize("name", ["norm", "add_norm"])
def test_rows_in_fp8(name):
    """As Qwen-Image-Edit has them with linear = fp8: each token's adaLN by its own row, written out in float64, then a
    scale per token by which its largest value becomes 448."""
    by_row = Segments(torch.device("cpu"), fused=False, fp8=True).by_row(ROWS)
    x, y = randn(2, 5, 64, seed=0), randn(2, 5, 64, seed=1)
    gate, shift, scale = (randn(2, 2, 64, seed=2 + n) for n in range(3))
    if name == "norm":
        summed, normed, exact = x, by_row.norm(x, shift, scale), by_row.exact.norm(x, shift, scale)
    else:
        summed, normed = by_row.add_norm(x, y, gate, shift, scale)
        exact_sum, exact = by_row.exact.add_norm(x, y, gate, shift, scale)
        assert torch.equal(summed, exact_sum) and torch.equal(summed, by_row.add(x, y, gate))
    assert normed.values.dtype == torch.float8_e4m3fn and normed.dtype == torch.float32
    assert normed.scales.shape == (2, 5, 1)
    for item in range(2):
        for token, row in enumerate(ROWS.tolist()):
            wide = x[item, token].double()
            if name == "add_norm":
                wide = wide + gate[item, row].double() * y[item, token].double()
                torch.testing.assert_close(summed[item, token].double(), wide, rtol=1e-6, atol=1e-6)
            centred = wide - wide.mean()
            wanted = centred / (centred.square().mean() + 1e-6).sqrt()
            wanted = wanted * (1 + scale[item, row].double()) + shift[item, row].double()
            torch.testing.assert_close(exact[item, token].double(), wanted, rtol=1e-5, atol=1e-5)
            unit = wanted.abs().max() / 448
            torch.testing.assert_close(normed.scales[item, token, 0].double(), unit, rtol=1e-5, atol=0)
            got = normed.values[item, token].double() * normed.scales[item, token].double()
            # Half the spacing of e4m3: 2^-4 of a value at most, of those below 2^-6 units 2^-10 units.
            assert ((got - wanted).abs() <= (wanted.abs() * 2**-4).clamp(min=unit * 2**-10) * 1.001).all()
            assert normed.values[item, token].float().abs().max() == 448


@pytest.mark.parametrize("fp8", [False, True])
def test_sandwiched_norms(fp8):
    """Each against its formula in float64; fp8: to within that type's rounding."""
    segments = Segments(torch.device("cpu"), fused=False, fp8=fp8)
    before, after = RMSNorm(16, EPS), RMSNorm(16, EPS)
    before.weight.data, after.weight.data = randn(16, seed=1), randn(16, seed=2)
    x, y = 1e-3 * randn(2, 5, 16, seed=3), 1e-3 * randn(2, 5, 16, seed=4)  # so that epsilon shows
    gate, scale = randn(2, 1, 16, seed=5), randn(2, 1, 16, seed=6)

    def normed(value, norm):
        return value / (value.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()

    summed = x.double() + gate.double().tanh() * normed(y.double(), after)
    wanted = normed(summed, before) * (1 + scale.double())
    got = segments.normed_add_norm(x, y, after, gate, before, scale)
    assert relative_difference(got[0].double(), summed) < 1e-6
    assert relative_difference(segments.normed_add(x, y, after, gate).double(), summed) < 1e-6
    for mine in (got[1], segments.scaled_norm(got[0], before, scale)):
        assert relative_difference(values_of(mine).double(), wanted) < (0.07 if fp8 else 1e-6)
    gated = values_of(segments.swiglu(x, y))
    assert relative_difference(gated.double(), F.silu(x.double()) * y.double()) < (0.07 if fp8 else 1e-6)


@pytest.mark.parametrize("fp8", [False, True])
def test_sandwiched_float16_stays_finite(fp8):
    """A product that left the type's range counts as its largest value, as in ComfyUI, and no number as zero."""
    segments = Segments(torch.device("cpu"), fused=False, fp8=fp8)
    after = RMSNorm(16, EPS)
    after.weight.data = torch.ones(16)
    x, gate = torch.zeros(1, 1, 16, dtype=torch.float16), torch.full((1, 1, 16), 20.0, dtype=torch.float16)
    y = torch.cat([torch.tensor([torch.inf, -torch.inf, torch.nan]), torch.full((13,), 65504.0)]).half()[None, None]
    unit = (16 / 15) ** 0.5
    wanted = torch.tensor([unit, -unit, 0.0, *[unit] * 13])
    for summed in (
        segments.normed_add(x, y, after, gate),
        segments.normed_add_norm(x, y, after, gate, after, torch.zeros_like(gate))[0],
    ):
        torch.testing.assert_close(summed.flatten().float(), wanted, rtol=1e-3, atol=0)
    large = torch.tensor([300.0, 300.0, torch.inf]).half()[None, None]
    value = torch.tensor([300.0, -300.0, 0.0]).half()[None, None]
    got = values_of(segments.swiglu(large, value)).flatten().float()
    torch.testing.assert_close(got, torch.tensor([65504.0, -65504, 0]), rtol=1e-3, atol=0)


def values_of(activations) -> torch.Tensor:
    """What quantised ones stand for."""
    if isinstance(activations, torch.Tensor):
        return activations
    return activations.values.float() * activations.scales
