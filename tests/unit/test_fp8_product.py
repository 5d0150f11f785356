"""Products in fp8: the values that are multiplied, which weights they take, and the ways round what torch refuses."""

import logging

import pytest
import torch
from fp8_shapes import FULL_SIZE, parts
from support import relative_difference

from fastusp_backend.kernels import fp8_product
from fastusp_backend.kernels.eight_bits import quantise
from fastusp_backend.kernels.fp8_product import Quantised, check_fp8_sizes
from fastusp_backend.kernels.tokens import quantise_reference
from fastusp_backend.models.chroma import Chroma
from fastusp_backend.models.flux import Flux
from fastusp_backend.models.flux2 import Flux2
from fastusp_backend.models.layers import Linear
from fastusp_backend.models.qwen_image import QwenImage
from fastusp_backend.models.sd3 import SD3
from fastusp_backend.models.synthetic import TINY_CHROMA, TINY_FLUX, TINY_FLUX2, TINY_QWEN_IMAGE, TINY_SD3, TINY_Z_IMAGE
from fastusp_backend.models.z_image import ZImage
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


@pytest.mark.parametrize(
    "kind, config",
    [
        (Flux, TINY_FLUX),
        (Flux2, TINY_FLUX2),
        (Chroma, TINY_CHROMA),
        (QwenImage, TINY_QWEN_IMAGE),
        (SD3, TINY_SD3),
        (ZImage, TINY_Z_IMAGE),
    ],
)
def test_the_large_layers_are_those_of_the_blocks_without_modulations(kind, config):
    with torch.device("meta"):
        model = kind(config)
    large = set(model.products())
    of_blocks = {layer for block in model.blocks() for layer in block.modules()}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            inside = module in of_blocks and "mod" not in name
            assert (module in large) == inside, name


@pytest.mark.parametrize(
    "config", [*FULL_SIZE.values(), TINY_FLUX, TINY_FLUX2, TINY_CHROMA, TINY_QWEN_IMAGE, TINY_SD3, TINY_Z_IMAGE]
)
def test_gpus_can_multiply_all_that_the_blocks_do(config):
    """Sizes, rows and their first bytes at multiples of 16, as torch and the GPUs' copy engines want them."""
    for part in parts(config):
        assert not any(size % 16 for size in (part.n, part.k, part.pitch, part.offset)), part


def test_sizes_that_gpus_cannot_multiply_are_refused():
    shapes = {(32, 48), (32, 40), (48, 16)}
    check_fp8_sizes(torch.device("cpu"), shapes)
    check_fp8_sizes(torch.device("cuda"), shapes - {(32, 40)})
    with pytest.raises(ValueError, match="set linear = exact: .* multiples of 16; this model has one of 32 x 40"):
        check_fp8_sizes(torch.device("cuda"), shapes)


REFUSAL = RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")


class Library:
    """torch's product, which refuses what `refuses` says, by (rows, scaled by row, with bias)."""

    def __init__(self, refuses=lambda *_: False, error=REFUSAL):
        self.refuses, self.error, self.calls = refuses, error, []

    def __call__(self, values, weight, *, scale_a, scale_b, bias=None, out_dtype, use_fast_accum):
        call = len(values), scale_a.numel() > 1 or scale_b.numel() > 1, bias is not None
        self.calls.append(call)
        if self.refuses(*call):
            raise self.error
        wide = values.float() @ weight.float() * scale_a * scale_b
        return (wide if bias is None else wide + bias.float()).to(out_dtype)


@pytest.fixture
def library(monkeypatch):
    """library(...): puts a `Library` in torch's place, on a GPU of some compute capability."""
    monkeypatch.setattr(fp8_product, "_refusals", {})

    def make(*arguments, capability=(9, 0), torch_version=(2, 11)) -> Library:
        made = Library(*arguments)
        monkeypatch.setattr(torch, "_scaled_mm", made)
        monkeypatch.setattr(fp8_product, "_capability", lambda device: capability)
        monkeypatch.setattr(fp8_product, "_torch_version", lambda: torch_version)
        return made

    return make


def given(rows: int = 5, bias: bool = True, columns: slice = slice(None)):
    """Arguments of `_multiply`, and what should come of them."""
    x = quantised(tokens().reshape(1, 10, 48)[:, :rows, columns].bfloat16().contiguous())
    fp8 = layer(torch.bfloat16)
    fp8.stored = fp8.stored.by_rows()
    offset = fp8.bias.data if bias else None
    values, scales, weight = x.values[0], x.scales[0], fp8.weight.data[:, columns]
    expected = (values.double() * scales) @ (weight.double() * fp8.scale).T + (0 if offset is None else offset.double())
    return (values, scales, weight, fp8.scale, offset, torch.bfloat16), expected


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "refuses, ways",
    [
        (lambda rows, by_row, biased: False, 1),
        (lambda rows, by_row, biased: biased and by_row, 2),  # cuBLAS on Hopper, few rows
        (lambda rows, by_row, biased: by_row, 3),  # no row-wise product
    ],
)
def test_a_way_round_what_is_refused(library, caplog, refuses, ways, bias):
    """As exact as the first: what is rounded to bfloat16 twice more differs by less than fp8's own error of 2.6 %."""
    caplog.set_level(logging.INFO)
    torchs, (arguments, expected) = library(refuses), given(bias=bias)
    first = fp8_product._multiply(*arguments)
    assert first.dtype == torch.bfloat16 and relative_difference(first.double(), expected) < 2**-7
    torchs.calls.clear()
    assert torch.equal(fp8_product._multiply(*arguments), first)
    assert len(torchs.calls) == 1  # what was refused is not asked for again, above all not during a capture
    refused = len(fp8_product._refusals)
    assert refused == (ways > 1 and (bias or ways > 2))
    assert ("refused (CUBLAS_STATUS_NOT_SUPPORTED)" in caplog.text) == bool(refused)


def test_a_refusal_is_one_shapes_own(library):
    """Many rows keep their bias in the product."""
    torchs = library(lambda rows, by_row, biased: biased and rows < 6)
    for rows in (5, 6, 10, 5):
        fp8_product._multiply(*given(rows)[0])
    assert torchs.calls == [(5, True, True), (5, True, False), (6, True, True), (10, True, True), (5, True, False)]


def test_torchs_own_checks_are_refusals_and_what_no_way_mends_is_raised(library):
    library(lambda rows, by_row, biased: by_row, ValueError("only bf16"))
    arguments, expected = given()
    assert relative_difference(fp8_product._multiply(*arguments).double(), expected) < 2**-7
    library(lambda *_: True, RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fp8_product._multiply(*arguments)
    fp8_product._refusals.clear()
    library(lambda *_: True, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        fp8_product._multiply(*arguments)
    assert not fp8_product._refusals, "it says nothing of the shape"
    library(lambda *_: True, torch.OutOfMemoryError("no room"))
    with pytest.raises(torch.OutOfMemoryError):
        fp8_product._multiply(*arguments)
    assert not fp8_product._refusals


@pytest.mark.parametrize(
    "torch_version, columns, by_row",
    [
        ((2, 11), slice(None), False),  # its kernel ignores the current stream
        ((2, 12), slice(None), True),
        ((2, 12), slice(16, None), False),  # and the row pitch, in all versions
    ],
)
def test_ada_goes_round_what_its_kernel_gets_wrong(library, torch_version, columns, by_row):
    torchs = library(capability=(8, 9), torch_version=torch_version)
    arguments, expected = given(columns=columns)
    assert relative_difference(fp8_product._multiply(*arguments).double(), expected) < 2**-7
    assert [call[1] for call in torchs.calls] == [by_row]
