"""Products in fp8 of every part of a weight that the families' blocks multiply at full size, for any number of rows."""

from contextlib import contextmanager

import pytest
import torch
from fp8_shapes import FULL_SIZE, Part, parts

from fastusp_backend.kernels import fp8_product, tokens
from fastusp_backend.kernels.fp8_product import Quantised, product


def lacks_fp8_products() -> bool:
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(lacks_fp8_products(), reason="needs a GPU of compute capability 8.9 or newer"),
]

FEW = range(1, 66)
MANY = (127, 256, 1000, 2304)
BOUND = 2e-2
"""Of the whole difference's norm. Hopper adds fp8 products up in about 14 bits; bfloat16 rounds by 2^-9 at most."""


def distinct_parts() -> list[Part]:
    """Those of all families, one for each shape: where rows begin does not matter, but where columns do."""
    found = {
        part._replace(offset=part.offset % part.pitch, bias=False)
        for kind in FULL_SIZE.values()
        for part in parts(kind)
    }
    return sorted(found)


@contextmanager
def float32_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


class Case:
    """A part of a weight with scales and bias, quantised tokens, and their product in float32."""

    def __init__(self, part: Part, rows: int):
        generator = torch.Generator("cuda").manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, device="cuda", generator=generator)

        whole = torch.empty(part.n, part.pitch, dtype=torch.float8_e4m3fn, device="cuda")
        for piece in whole.chunk(8):
            piece.copy_((100 * randn(*piece.shape)).clamp(-448, 448))
        self.weight = whole[:, part.offset : part.offset + part.k]
        self.scales = randn(part.n, 1).abs() / (100 * part.k**0.5)
        self.bias = randn(part.n).bfloat16()
        self.tokens = Quantised(*tokens.quantise_tokens(randn(1, rows, part.k).bfloat16()), torch.bfloat16)
        wide = (self.tokens.values.float() * self.tokens.scales)[0]
        with float32_products():
            pieces = zip(self.weight.chunk(8), self.scales.chunk(8), strict=True)
            self.expected = torch.cat([wide @ (piece.float() * scale).T for piece, scale in pieces], dim=1)

    def take(self, rows: int) -> Quantised:
        """Some of the tokens, in memory of their own, as a rank has them."""
        return Quantised(self.tokens.values[:, :rows].clone(), self.tokens.scales[:, :rows].clone(), torch.bfloat16)

    def error(self, got: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        expected = self.expected[: got.shape[1]] + (0 if bias is None else bias.float())
        return (got[0].float() - expected).norm() / expected.norm()


@pytest.mark.parametrize("part", distinct_parts(), ids=lambda part: f"{part.n}x{part.k} of {part.pitch}")
def test_any_number_of_rows(part):
    counts = [*FEW, *MANY]
    case = Case(part, max(counts))
    failed, errors = {}, {}
    for rows in counts:
        for bias in (case.bias, None):
            name = f"{rows} rows, {'no ' * (bias is None)}bias"
            try:
                errors[name] = case.error(product(case.take(rows), case.weight, case.scales, bias), bias)
            except (RuntimeError, ValueError) as error:
                failed[name] = str(error).splitlines()[0]
    told = dict(zip(errors, torch.stack(list(errors.values())).tolist(), strict=True))
    wrong = {name: error for name, error in told.items() if not error < BOUND}
    assert not failed and not wrong
    mine = {
        shape[0]: ways for shape, ways in fp8_product._refusals.items() if shape[1:4] == (part.n, part.k, part.pitch)
    }
    print(f"{part}: rows that did not take the first way: {mine}")
    if torch.cuda.get_device_capability() == (9, 0):
        assert not set(mine) & set(MANY)  # nothing is added to what is large


@pytest.mark.parametrize("way", fp8_product._WAYS, ids=lambda way: way.__name__)
def test_every_way_gives_the_same(way):
    """Also those that nothing takes on this GPU. 256 rows: as many as the first takes."""
    if way is not fp8_product._all_after and torch.cuda.get_device_capability() == (8, 9):
        pytest.skip("torch's row-wise product takes rows for contiguous on Ada")
    for part in (Part(3072, 3072, 3072, 0, True), Part(3072, 3072, 15360, 3072, True)):
        case = Case(part, 256)
        for bias in (case.bias, None):
            values, scales = case.tokens.values[0], case.tokens.scales[0]
            got = way(values, scales, case.weight, case.scales, bias, torch.bfloat16)
            assert case.error(got[None], bias).item() < BOUND


@pytest.mark.parametrize("rows", [0, 1, 5, 300])
def test_a_captured_product_is_replayed(rows):
    """After one run outside, as a step is; tokens of two prompts, the second product's of the first's memory."""
    case = Case(Part(3072, 12288, 15360, 3072, True), 2 * max(rows, 1))
    values = case.tokens.values[0, : 2 * rows].view(2, rows, 12288).clone()
    scales = case.tokens.scales[0, : 2 * rows].view(2, rows, 1).clone()
    given = Quantised(values, scales, torch.bfloat16)
    expected = product(given, case.weight, case.scales, case.bias)
    assert expected.shape == (2, rows, 3072)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = product(given, case.weight, case.scales, case.bias)
        got = got * 1  # so that a graph of no product holds something
    if rows:
        got.zero_()
        graph.replay()
    assert torch.equal(got, expected)


def test_rows_that_lie_apart():
    """Some tokens of longer sequences, and scales likewise."""
    case = Case(Part(3072, 3072, 3072, 0, True), 40)
    values, scales = case.tokens.values.view(2, 20, -1)[:, :7], case.tokens.scales.view(2, 20, 1)[:, :7]
    got = product(Quantised(values, scales, torch.bfloat16), case.weight, case.scales, case.bias)
    expected = case.expected.view(2, 20, -1)[:, :7] + case.bias.float()
    assert ((got.float() - expected).norm() / expected.norm()).item() < BOUND
