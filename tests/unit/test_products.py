"""Products in fp8: the values that are multiplied, and which weights they take."""

import pytest
import torch
from support import relative_difference

from fastusp_backend.kernels.eight_bits import quantise
from fastusp_backend.kernels.tokens import quantise_reference
from fastusp_backend.models.flux import Flux
from fastusp_backend.models.flux2 import Flux2
from fastusp_backend.models.layers import Linear
from fastusp_backend.models.products import Quantised
from fastusp_backend.models.qwen_image import QwenImage
from fastusp_backend.models.synthetic import TINY_FLUX, TINY_FLUX2, TINY_QWEN_IMAGE
from fastusp_backend.weights.stored import Stored

pytestmark = pytest.mark.unit


def layer(dtype=torch.float32, seed: int = 0) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    made = Linear(48, 32)
    made.weight.data = (torch.randn(32, 48, generator=generator) * torch.linspace(0.1, 9, 32)[:, None]).to(dtype)
    made.bias.data = torch.randn(32, generator=generator).to(dtype)
    return made


def tokens() -> torch.Tensor:
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    x[:, :, 3] *= 50  # an outlier channel
    return x


def quantised(x: torch.Tensor) -> Quantised:
    return Quantised(*quantise_reference(x), x.dtype)


def test_a_product_is_that_of_the_quantised_values():
    x, exact = tokens(), layer()
    values, scales = quantise(x)
    weight, rows = quantise(exact.weight)
    expected = (values.double() * scales[..., None]) @ (weight.double() * rows[:, None]).T + exact.bias.double()
    exact.stored = exact.stored.by_rows()
    got = exact(quantised(x))
    assert got.dtype == torch.float32 and relative_difference(got.double(), expected) < 1e-6
    assert 1e-3 < relative_difference(got, layer()(x)) < 0.1


def test_rows_and_columns_make_up_the_whole():
    x, fp8 = tokens(), layer()
    fp8.stored = fp8.stored.by_rows()
    whole = fp8(quantised(x))
    parts = [fp8(quantised(x), rows) for rows in (slice(0, 20), slice(20, None))]
    torch.testing.assert_close(torch.cat(parts, -1), whole)
    exact = layer()
    for own, activations in ((exact, lambda t: t), (fp8, quantised)):
        first = own(activations(x[..., 16:]), columns=slice(16, None))
        sums = own.add_to(first, activations(x[..., :16]), slice(0, 16))
        assert relative_difference(sums, own(activations(x))) < (1e-6 if own is exact else 0.1)


def test_what_is_in_e4m3_keeps_its_values():
    data = torch.randn(6, 8).to(torch.float8_e4m3fn)
    for scale in (None, torch.tensor(0.25)):
        stored = Stored(data, scale).by_rows()
        assert stored.data is data and torch.equal(stored.dequantise(), Stored(data, scale).dequantise())


def test_a_changed_weight_gets_new_scales_by_row():
    stored = layer().stored.by_rows()
    value = stored.dequantise() * torch.linspace(1, 3, 32)[:, None]
    address = stored.data.data_ptr()
    stored.store(value)
    assert stored.data.data_ptr() == address
    ulp = stored.scale * 32
    assert ((stored.dequantise() - value).abs() <= ulp / 2).all()


@pytest.mark.parametrize("kind, config", [(Flux, TINY_FLUX), (Flux2, TINY_FLUX2), (QwenImage, TINY_QWEN_IMAGE)])
def test_the_large_layers_are_those_of_the_blocks_without_modulations(kind, config):
    with torch.device("meta"):
        model = kind(config)
    large = set(model.products())
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            inside = "blocks." in name and "mod" not in name.removeprefix("modules")
            assert (module in large) == inside, name
