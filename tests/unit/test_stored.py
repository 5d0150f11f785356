"""What lies in memory: values and scales of fp8, GGUF's blocks, storing in place."""

import gguf
import pytest
import torch
from formats import HALVES, random_blocks
from support import randn

from fastusp_backend.weights import gguf_blocks
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


@pytest.mark.parametrize("name", HALVES)
def test_unpacking_is_the_reference_bit_by_bit(name, monkeypatch):
    monkeypatch.setattr(gguf_blocks, "PIECE", 512)
    data = random_blocks(name, 7, 512, seed=3)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    assert 0.5 < expected.std() * 512**0.5 < 2 and abs(expected.mean()) < 0.02
    for dtype in (torch.float32, torch.bfloat16):
        got = gguf_blocks.unpack(torch.from_numpy(data), name, dtype)
        assert torch.equal(got, torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("name", ["Q5_0", "Q4_K"])
@pytest.mark.parametrize("columns", [slice(256, 512), slice(None, 256), slice(100, 300), slice(None)])
def test_only_the_blocks_of_the_columns_are_unpacked(name, columns, monkeypatch):
    unpacked = []
    function = gguf_blocks.PACKINGS[name][2]
    counted = (*gguf_blocks.PACKINGS[name][:2], lambda blocks: unpacked.append(function(blocks)) or unpacked[-1])
    monkeypatch.setitem(gguf_blocks.PACKINGS, name, counted)
    low_rank = randn(7, 2, seed=1), randn(2, 512, seed=2)
    stored = Stored(torch.from_numpy(random_blocks(name, 7, 512, seed=3)), None, name, low_rank)
    want = stored.values(torch.float32)[2:5, columns]
    unpacked.clear()
    torch.testing.assert_close(stored.values(torch.float32, slice(2, 5), columns), want)
    count = 512 if columns.start == 100 else want.shape[1]
    assert sum(t.numel() for t in unpacked) == 3 * count


def test_all_formats_are_tested():
    assert HALVES.keys() == gguf_blocks.PACKINGS.keys()


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
