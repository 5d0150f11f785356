"""What lies in memory: values and scales of fp8, storing in place."""

import pytest
import torch

from fastusp_backend.weights.stored import Stored
from fastusp_backend.weights.tensor_info import FP8

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.full((4, 1), 0.5)], ids=["tensor", "rows"])
def test_scaled_values_are_never_the_stored_ones(dtype, scale):
    stored = Stored(torch.ones(4, 4, dtype=dtype), scale)
    for _ in range(2):
        assert stored.values(dtype).eq(0.5).all() and stored.values(dtype, slice(2), slice(1, 3)).eq(0.5).all()
        assert stored.dequantise().eq(0.5).all()
    assert stored.data.eq(1).all()


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("scaled", [True, False])
def test_storing_in_fp8_in_place(dtype, scaled):
    values = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    stored = Stored(torch.zeros(64, 32, dtype=dtype), torch.tensor(3.0) if scaled else None)
    addresses = stored.data.data_ptr(), scaled and stored.scale.data_ptr()
    stored.store(values)
    assert (stored.data.data_ptr(), scaled and stored.scale.data_ptr()) == addresses
    scale = stored.scale if scaled else 1.0
    spacing = torch.finfo(dtype).eps * values.abs().clamp(min=torch.finfo(dtype).tiny * scale)
    assert ((stored.dequantise() - values).abs() <= spacing / 2 * 1.01).all()
    stored.store(values * 1e6)
    assert stored.dequantise().isfinite().all()
    stored.store(torch.zeros(64, 32))
    assert not stored.dequantise().any()


def test_storing_in_other_types():
    stored = Stored(torch.zeros(2, 2, dtype=torch.bfloat16))
    values = stored.dequantise()
    values += 1 / 3
    assert not stored.data.any()
    stored.store(values)
    assert torch.equal(stored.data, values.bfloat16())
    plain = Stored(torch.zeros(2))
    assert plain.dequantise().data_ptr() != plain.data.data_ptr()
