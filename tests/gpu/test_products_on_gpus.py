"""Products of few rows: the choice between two ways is measured, kept, and taken in a capture."""

import pytest
import torch

from fastusp_backend import choices
from fastusp_backend.models import products

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "_made", {})


def operands(rows, dtype=torch.bfloat16):
    torch.manual_seed(rows)
    x = torch.randn(1, rows, 12288, device="cuda").to(dtype)
    weight = (torch.randn(3072, 15360, device="cuda") * 0.02).to(dtype)[:, 3072:]
    return x, weight, torch.randn(3072, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [272, 288, 544, 576, 1024])
def test_an_epilogue_rounds_once_and_the_other_way_at_most_twice(rows, dtype):
    x, weight, bias = operands(rows, dtype)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    rounding = (exact.to(dtype).double() - exact).norm()
    for way, roundings in (("epilogue", 1), ("rows", 2)):
        error = (products._WAYS[way](x, weight, bias).double() - exact).norm()
        assert error < 1.02 * roundings**0.5 * rounding


def test_the_choice_is_kept_and_captured(monkeypatch):
    given = operands(576)
    with torch.inference_mode():
        y = products.linear(*given)
        ((asked, way),) = choices._made.items()
        assert torch.equal(y, products._WAYS[way](*given))
        monkeypatch.setattr(choices, "_made", {})  # another process
        monkeypatch.setattr(products, "_measured", lambda *_: pytest.fail("measured again"))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = products.linear(*given)
        graph.replay()
        assert torch.equal(captured, y) and choices._made == {asked: way}


def test_a_capture_measures_nothing():
    given = operands(576)
    products._WAYS["epilogue"](*given)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        products.linear(*given)
    assert not choices._made and not choices.folder().exists()
