"""The Triton kernel between products against its plain torch references, and products in fp8 on the GPU."""

import pytest
import torch

from fastusp_backend.kernels import tokens
from fastusp_backend.models.layers import Linear
from fastusp_backend.models.products import Quantised

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BOUNDS = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}


def given(dtype, width, rows=77):
    generator = torch.Generator("cuda").manual_seed(0)
    x, y = (torch.randn(2, rows, width, device="cuda", generator=generator).to(dtype) for _ in "xy")
    modulations = torch.randn(2, 1, 5 * width, device="cuda", generator=generator).to(dtype)[..., width:]
    return x, y, *modulations.split(width, -1)[:3]  # views, as a row of the table has them


@pytest.mark.parametrize("width", [512, 3072])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_norms_equal_their_references(dtype, width):
    x, y, gate, shift, scale = given(dtype, width)
    pairs = [
        (tokens.add_norm(x, y, gate, shift, scale, fp8=False), tokens.add_norm_reference(x, y, gate, shift, scale)),
        (tokens.norm(x, shift, scale, fp8=False), (tokens.norm_reference(x, shift, scale),)),
    ]
    for got, expected in pairs:
        for mine, wanted in zip(got, expected, strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(mine, wanted, rtol=2 * BOUNDS[dtype], atol=8 * BOUNDS[dtype])


def test_a_float16_stream_stays_finite():
    x, y, gate, shift, scale = given(torch.float16, 512)
    x[0, 0, :3] = torch.tensor([6e4, -6e4, float("nan")])
    gate[:], y[0, 0] = 1, 6e4 * torch.sign(x[0, 0])
    summed, _ = tokens.add_norm(x, y, gate, shift, scale, fp8=False)
    torch.testing.assert_close(summed, tokens.add_reference(x, y, gate))


@pytest.mark.parametrize("width", [512, 3072, 12288, 18432])
def test_fp8_is_the_quantised_reference(width):
    x, y, gate, shift, scale = given(torch.bfloat16, width)
    wide = torch.cat([x, y], -1)
    text = x[:, :30]  # of a longer sequence: rows of a batch item lie further apart
    cases = [
        (tokens.quantise_tokens(text), tokens.quantise_reference(text)),
        (tokens.gelu_quantise(x), tokens.quantise_reference(tokens.gelu_reference(x.float()))),
        (tokens.swiglu_quantise(wide), tokens.quantise_reference(tokens.swiglu_reference(wide.float()))),
        (tokens.norm(x, shift, scale, fp8=True), tokens.quantise_reference(tokens.norm_reference(x, shift, scale))),
    ]
    for (values, scales), (expected, expected_scales) in cases:
        torch.testing.assert_close(scales, expected_scales, rtol=2**-6, atol=0)
        torch.testing.assert_close(values.float() * scales, expected.float() * expected_scales, rtol=0.13, atol=0.05)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_stays_so_in_fp8(bad):
    x, y, gate, shift, scale = given(torch.bfloat16, 3072)
    x[1, 60, 7] = bad
    cases = [tokens.quantise_tokens(x), tokens.norm(x, shift, scale, fp8=True)]
    cases += [tokens.swiglu_quantise(x), tokens.add_norm(x, y, gate, shift, scale, fp8=True)[1:]]
    if bad != float("-inf"):  # of which gelu is 0
        cases.append(tokens.gelu_quantise(x))
    for values, scales in cases:
        lost = (values.float() * scales).isnan()
        assert lost[1, 60].all() and not lost[0].any() and not lost[1, :60].any() and not lost[1, 61:].any()


@pytest.mark.parametrize(
    "rows, columns", [(slice(None), slice(None)), (slice(128, 384), slice(None)), (slice(None), slice(256, None))]
)
def test_products_equal_those_of_the_quantised_values(rows, columns):
    x = given(torch.bfloat16, 512)[0]
    layer = Linear(512, 384).cuda()
    layer.weight.data, layer.bias.data = torch.randn(384, 512).cuda().bfloat16(), torch.randn(384).cuda().bfloat16()
    layer.stored = layer.stored.by_rows()
    part = x[..., columns].contiguous()
    quantised = Quantised(*tokens.quantise_tokens(part), x.dtype)
    got = layer(quantised, rows, columns)
    values = quantised.values.double() * quantised.scales.double()
    weight = layer.stored.dequantise().double()[rows, columns]
    expected = values @ weight.T + layer.bias.double()[rows]
    assert ((got.double() - expected).norm() / expected.norm()).item() < 1e-2
