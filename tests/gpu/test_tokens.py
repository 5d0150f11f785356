"""The Triton kernel between products against its plain torch references, and products in fp8 on the GPU."""

import pytest
import torch

from fastusp_backend.kernels import sandwich, tokens
from fastusp_backend.kernels.fp8_product import Quantised
from fastusp_backend.models.layers import Linear
from fastusp_backend.models.segments import Segments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BOUNDS = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}


def given(dtype, width, rows=1):
    """x, y (2, 77, width), then gate, shift, scale of so many rows each."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, y = (torch.randn(2, 77, width, device="cuda", generator=generator).to(dtype) for _ in "xy")
    modulations = torch.randn(2, rows, 5 * width, device="cuda", generator=generator).to(dtype)[..., width:]
    return x, y, *modulations.split(width, -1)[:3]  # views, as a row of the table has them


def chosen(rows: int, first: int = 0) -> torch.Tensor | None:
    """Of so many rows the one that each token from `first` on takes; None where there is but one."""
    if rows == 1:
        return None
    return torch.randint(rows, (77,), device="cuda", generator=torch.Generator("cuda").manual_seed(1))[first:]


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("width", [512, 3072])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_norms_equal_their_references(dtype, width, rows):
    """Also where each token takes one of several rows of modulations."""
    x, y, gate, shift, scale = given(dtype, width, rows)
    which = chosen(rows)
    pairs = [
        (
            tokens.add_norm(x, y, gate, shift, scale, which, fp8=False),
            tokens.add_norm_reference(x, y, gate, shift, scale, which),
        ),
        (tokens.norm(x, shift, scale, which, fp8=False), (tokens.norm_reference(x, shift, scale, which),)),
        ((tokens.add(x, y, gate, which),), (tokens.add_reference(x, y, gate, which),)),
    ]
    for got, expected in pairs:
        for mine, wanted in zip(got, expected, strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(mine, wanted, rtol=2 * BOUNDS[dtype], atol=8 * BOUNDS[dtype])


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_for_each_token_is_that_row_for_all_bit_by_bit(dtype, fp8):
    """Tokens of a longer sequence, whose numbers begin at no multiple of 16 bytes."""
    x, y, gate, shift, scale = given(dtype, 3072, 2)
    x, y, which = x[:, 5:], y[:, 5:], chosen(2, 5)
    got = tokens.add_norm(x, y, gate, shift, scale, which, fp8=fp8)
    alone = [tokens.add_norm(x, y, *(m[:, n : n + 1] for m in (gate, shift, scale)), fp8=fp8) for n in range(2)]
    for mine, *of_row in zip(got, *alone, strict=True):
        first, second = (part.float() for part in of_row)
        assert torch.equal(mine.float(), torch.where(which[:, None] == 0, first, second))
    assert 0 < which.sum() < len(which)


@pytest.mark.parametrize("fp8", [False, True])
def test_fused_segments_by_row_are_the_separate_operations(fp8):
    """Of the whole stream, of its end (the image's), and of modulations of one row."""
    x, y, gate, shift, scale = given(torch.bfloat16, 3072, 2)
    fused, plain = (
        Segments(x.device, fused=fused, fp8=fp8).by_row(torch.cat([chosen(2).new_zeros(23), chosen(2, 23)]))
        for fused in (True, False)
    )
    for first, of in ((0, slice(None)), (23, slice(None)), (0, slice(1))):
        part, other = x[:, first:], y[:, first:]
        modulations = [m[:, of] for m in (gate, shift, scale)]
        for mine, wanted in (
            (fused.exact.norm(part, *modulations[1:]), plain.exact.norm(part, *modulations[1:])),
            (fused.add(part, other, modulations[0]), plain.add(part, other, modulations[0])),
            *zip(
                fused.exact.add_norm(part, other, *modulations),
                plain.exact.add_norm(part, other, *modulations),
                strict=True,
            ),
        ):
            torch.testing.assert_close(mine, wanted, rtol=2**-6, atol=2**-4)
        if fp8:
            for mine, wanted in (
                (fused.norm(part, *modulations[1:]), plain.norm(part, *modulations[1:])),
                (fused.add_norm(part, other, *modulations)[1], plain.add_norm(part, other, *modulations)[1]),
            ):
                torch.testing.assert_close(mine.scales, wanted.scales, rtol=2**-6, atol=0)
                unpacked = (packed.values.float() * packed.scales for packed in (mine, wanted))
                torch.testing.assert_close(*unpacked, rtol=0.13, atol=0.05)


@pytest.mark.parametrize("width", [512, 3072, 18432])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_swiglu_equals_its_reference(dtype, width):
    x, y, *_ = given(dtype, width)
    wide = torch.cat([x, y], -1)
    mine, expected = tokens.swiglu(wide), tokens.swiglu_reference(wide.float()).to(dtype)
    assert mine.dtype == dtype
    torch.testing.assert_close(mine, expected, rtol=2 * BOUNDS[dtype], atol=2 * BOUNDS[dtype])


def test_a_float16_stream_stays_finite():
    x, y, gate, shift, scale = given(torch.float16, 512)
    x[0, 0, :3] = torch.tensor([6e4, -6e4, float("nan")])
    gate[:], y[0, 0] = 1, 6e4 * torch.sign(x[0, 0])
    summed, _ = tokens.add_norm(x, y, gate, shift, scale, fp8=False)
    torch.testing.assert_close(summed, tokens.add_reference(x, y, gate))
    assert torch.equal(tokens.add(x, y, gate), summed)


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


@pytest.mark.parametrize("width", [512, 3840])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sandwiched_norms_equal_their_references(dtype, width):
    """Also of a stream's end, whose images do not lie one behind the other."""
    x, y, gate, before, scale = given(dtype, width)
    before, after = before[0, 0].contiguous(), scale[1, 0].contiguous()
    for first in (0, 23):
        part, other = x[:, first:], y[:, first:]
        wanted = sandwich.add_reference(part, other, after, gate)
        pairs = [
            (sandwich.add(part, other, after, gate), wanted),
            (sandwich.norm(part, before, scale, fp8=False)[0], sandwich.norm_reference(part, before, scale)),
            (sandwich.swiglu(part, other, fp8=False)[0], sandwich.swiglu_reference(part, other)),
        ]
        summed, normed = sandwich.add_norm(part, other, after, gate, before, scale, fp8=False)
        pairs += [(summed, wanted), (normed, sandwich.norm_reference(summed, before, scale))]
        for mine, expected in pairs:
            assert mine.dtype == dtype
            torch.testing.assert_close(mine, expected, rtol=4 * BOUNDS[dtype], atol=16 * BOUNDS[dtype])


def test_sandwiched_float16_stays_finite():
    x, y, gate, before, scale = given(torch.float16, 512)
    before, after = before[0, 0].contiguous(), scale[1, 0].contiguous()
    y[0, 0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    wide, value = 300 * x, 300 * y
    wide[0, 1, :2], value[0, 1, :2] = float("inf"), torch.tensor([0.0, 1.0])
    wanted = sandwich.add_reference(x, y, after, gate)
    for mine, expected in (
        (sandwich.add(x, y, after, gate), wanted),
        (sandwich.add_norm(x, y, after, gate, before, scale, fp8=False)[0], wanted),
        (sandwich.swiglu(wide, value, fp8=False)[0], sandwich.swiglu_reference(wide, value)),
    ):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, expected, rtol=4 * BOUNDS[torch.float16], atol=16 * BOUNDS[torch.float16])


def test_sandwiched_norms_in_fp8():
    """The values that are not quantised, rounded. Sums are of kernels compiled apart, which may contract multiply-adds
    otherwise."""
    x, y, gate, before, scale = given(torch.bfloat16, 3840)
    before, after = before[0, 0].contiguous(), scale[1, 0].contiguous()
    plain = sandwich.add_norm(x, y, after, gate, before, scale, fp8=False)
    summed, values, scales = sandwich.add_norm(x, y, after, gate, before, scale, fp8=True)
    torch.testing.assert_close(summed, plain[0], rtol=4 * BOUNDS[summed.dtype], atol=16 * BOUNDS[summed.dtype])
    for (mine, by), wanted in (
        ((values, scales), plain[1]),
        (sandwich.norm(x, before, scale, fp8=True), sandwich.norm(x, before, scale, fp8=False)[0]),
        (sandwich.swiglu(x, y, fp8=True), sandwich.swiglu(x, y, fp8=False)[0]),
    ):
        error = (mine.float() * by - wanted.float()).abs()
        assert (error <= 2**-4 * wanted.float().abs() + by).all()
