"""Products of few rows: the choice between two ways is measured, kept, and taken in a capture."""

import pytest
import torch

from fastusp_backend import choices
from fastusp_backend.models import biased_product as module

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "_chosen", {})


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
    for way, roundings in (("epilogue", 1), ("prefilled", 2)):
        error = (module._WAYS[way](x, weight, bias).double() - exact).norm()
        assert error < 1.02 * roundings**0.5 * rounding


def test_the_choice_is_kept_and_captured(monkeypatch):
    given = operands(576)
    with torch.inference_mode():
        y = module.biased_product(*given)
        ((question, way),) = choices._chosen.items()
        assert torch.equal(y, module._WAYS[way](*given))
        monkeypatch.setattr(choices, "_chosen", {})  # another process
        monkeypatch.setattr(module, "_measured", lambda *_: pytest.fail("measured again"))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = module.biased_product(*given)
        graph.replay()
        assert torch.equal(captured, y) and choices._chosen == {question: way}


def test_a_capture_measures_nothing():
    given = operands(576)
    module._WAYS["epilogue"](*given)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        module.biased_product(*given)
    assert not choices._chosen and not choices.folder().exists()
