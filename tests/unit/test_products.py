"""Products with a bias: both ways give the same, and which shapes choose between them."""

import pytest
import torch
import torch.nn.functional as F

from fastusp_backend.models import products

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("way", products._WAYS.values())
@pytest.mark.parametrize("shape", [(2, 5, 48), (10, 48)])
def test_both_ways_are_a_product_and_its_bias(way, shape):
    torch.manual_seed(0)
    x, wide, bias = torch.randn(shape).double(), torch.randn(32, 64).double(), torch.randn(32).double()
    weight = wide[:, 16:]  # as the MLP's columns of FLUX's linear2 lie
    before = bias.clone()
    torch.testing.assert_close(way(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(bias, before)


class OnGPU(torch.Tensor):
    """What a GPU's tensor says of itself."""

    is_cuda = True


def chosen(monkeypatch, rows, n, k, *, dtype=torch.bfloat16, bias=True, captures=False, known=None):
    """The way of a product on a GPU, None where none is chosen, and whether it was measured."""
    said, measured = [], []
    for name in products._WAYS:
        monkeypatch.setitem(products._WAYS, name, lambda *_, name=name: said.append(name))
    monkeypatch.setattr(products.F, "linear", lambda *_: said.append(None))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(products, "_measured", lambda *_: measured.append(1) or "rows")
    monkeypatch.setattr(products.choices, "known", lambda *_: known)
    monkeypatch.setattr(products.choices, "_keep", lambda asked, among, way: way)
    x = torch.empty(1, rows, k, dtype=dtype, device="meta").as_subclass(OnGPU)
    weight = torch.empty(n, k, dtype=dtype, device="meta")
    products.linear(x, weight, torch.empty(n, device="meta") if bias else None)
    return *said, bool(measured)


def test_shapes_of_few_rows_are_measured_once(monkeypatch):
    assert chosen(monkeypatch, 576, 3072, 12288) == ("rows", True)
    assert chosen(monkeypatch, 576, 3072, 12288, known="epilogue") == ("epilogue", False)


def test_nothing_is_measured_in_a_capture(monkeypatch):
    assert chosen(monkeypatch, 576, 3072, 12288, captures=True) == ("epilogue", False)
    assert chosen(monkeypatch, 576, 3072, 12288, captures=True, known="rows") == ("rows", False)


@pytest.mark.parametrize("rows, n, k", [(2304, 3072, 12288), (64, 9216, 3072), (576, 3072, 3072)])
def test_other_shapes_are_products_as_torch_has_them(monkeypatch, rows, n, k):
    assert chosen(monkeypatch, rows, n, k) == (None, False)


def test_without_a_bias_or_in_float32_there_is_no_choice(monkeypatch):
    assert chosen(monkeypatch, 576, 3072, 12288, bias=False) == (None, False)
    assert chosen(monkeypatch, 576, 3072, 12288, dtype=torch.float32) == (None, False)
