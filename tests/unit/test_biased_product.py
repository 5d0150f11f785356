"""Products with a bias: both ways give the same, and which shapes choose between them."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from fastusp_backend.models import biased_product as module
from fastusp_backend.models import layers

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("way", module._WAYS.values())
@pytest.mark.parametrize("shape", [(2, 5, 48), (10, 48), (1, 1, 48)])
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


def chosen(monkeypatch, rows, n, k, *, dtype=torch.bfloat16, captures=False, known=None):
    """The way of a product on a GPU, None where none is chosen, and whether it was measured."""
    said, measured = [], []
    for name in module._WAYS:
        monkeypatch.setitem(module._WAYS, name, lambda *_, name=name: said.append(name))
    monkeypatch.setattr(module.F, "linear", lambda *_: said.append(None))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(module, "_measured", lambda *_: measured.append(1) or "prefilled")
    monkeypatch.setattr(module.choices, "known", lambda *_: known)
    monkeypatch.setattr(module.choices, "_keep", lambda question, ways, way: way)
    x = torch.empty(1, rows, k, dtype=dtype, device="meta").as_subclass(OnGPU)
    weight = torch.empty(n, k, dtype=dtype, device="meta")
    module.biased_product(x, weight, torch.empty(n, device="meta"))
    return *said, bool(measured)


def test_shapes_of_few_rows_are_measured_once(monkeypatch):
    assert chosen(monkeypatch, 576, 3072, 12288) == ("prefilled", True)
    assert chosen(monkeypatch, 576, 3072, 12288, known="epilogue") == ("epilogue", False)


def test_nothing_is_measured_in_a_capture(monkeypatch):
    assert chosen(monkeypatch, 576, 3072, 12288, captures=True) == ("epilogue", False)
    assert chosen(monkeypatch, 576, 3072, 12288, captures=True, known="prefilled") == ("prefilled", False)


@pytest.mark.parametrize("rows, n, k", [(2304, 3072, 12288), (64, 9216, 3072), (576, 3072, 3072)])
def test_other_shapes_are_products_as_torch_has_them(monkeypatch, rows, n, k):
    assert chosen(monkeypatch, rows, n, k) == (None, False)


def test_in_float32_there_is_no_choice(monkeypatch):
    assert chosen(monkeypatch, 576, 3072, 12288, dtype=torch.float32) == (None, False)


@pytest.mark.parametrize("rows, chooses", [(127, False), (128, True), (1024, True), (1025, False)])
def test_with_few_rows_kernels_hardly_differ_and_with_many_they_are_full(monkeypatch, rows, chooses):
    assert chosen(monkeypatch, rows, 9216, 12288)[1] is chooses


class Clock:
    """A GPU's events: calls of one way take so long, each turn a little longer or shorter."""

    def __init__(self, monkeypatch, **ms):
        self.now, self.turn, self.ms = 0.0, 0, ms
        for name in module._WAYS:
            monkeypatch.setitem(module._WAYS, name, lambda *_, name=name: self.call(name))
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event(self))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda _: setattr(self, "turn", self.turn + 1))
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())

    def call(self, name):
        loading = 100.0 if self.turn <= 2 else 0.0  # the first turn of either
        self.now += self.ms[name] + loading * (name == "prefilled") + 0.01 * (self.turn % 5)


class Event:
    def __init__(self, clock):
        self.clock, self.ended = clock, False

    def record(self):
        self.at = self.clock.now

    def synchronize(self):
        self.ended = True

    def elapsed_time(self, last):
        assert last.ended
        return last.at - self.at


@pytest.mark.parametrize(
    "epilogue, prefilled, way", [(0.8, 0.7, "prefilled"), (0.7, 0.69, "epilogue"), (0.7, 0.8, "epilogue")]
)
def test_the_other_way_is_taken_where_it_is_clearly_faster(monkeypatch, epilogue, prefilled, way):
    Clock(monkeypatch, epilogue=epilogue, prefilled=prefilled)
    assert module._measured(torch.empty(1, 576, 64), torch.empty(64, 64), torch.empty(64)) == way


def test_what_a_choice_may_depend_on_is_in_its_question(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", "GPU {}".format)
    first = [0, torch.bfloat16, 576, 3072, 12288, 15360]
    others = [1, torch.float16, 544, 9216, 3072, 12288]
    changed = [[*first[:i], other, *first[i + 1 :]] for i, other in enumerate(others)]
    questions = {module._question(*given) for given in [first, *changed]}
    assert len(questions) == 7 and all(torch.__version__ in question for question in questions)


def test_layers_choose(monkeypatch):
    layer = layers.Linear(4, 3)
    layer.weight.data.fill_(1.0), layer.bias.data.fill_(2.0)
    said = []
    monkeypatch.setattr(layers, "biased_product", lambda *given: said.append([len(given[1]), given[2]]) or 7)
    assert layer(torch.ones(2, 4), slice(1, 3)) == 7
    assert said[0][0] == 2 and torch.equal(said[0][1], layer.bias[1:])
    assert torch.equal(layer(torch.ones(2, 4), bias=False), torch.full((2, 3), 4.0)) and len(said) == 1
