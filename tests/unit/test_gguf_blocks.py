"""GGUF's blocks, unpacked: against the package `gguf`, and no more of them than is asked for."""

import gguf
import pytest
import torch
from formats import HALVES, random_blocks
from support import randn

from fastusp_backend.weights import gguf_blocks, packings
from fastusp_backend.weights.stored import Stored

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", HALVES)
def test_unpacking_is_the_reference_bit_by_bit(name, monkeypatch):
    monkeypatch.setattr(packings, "PIECE", 512)
    data = random_blocks(name, 7, 512, seed=3)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    assert 0.5 < expected.std() * 512**0.5 < 2 and abs(expected.mean()) < 0.02
    for dtype in (torch.float32, torch.bfloat16):
        got = packings.unpack(torch.from_numpy(data), name, dtype)
        assert torch.equal(got, torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("name", ["Q5_0", "Q4_K"])
@pytest.mark.parametrize("columns", [slice(256, 512), slice(None, 256), slice(100, 300), slice(None)])
def test_only_the_blocks_of_the_columns_are_unpacked(name, columns, monkeypatch):
    unpacked = []
    packing = packings.PACKINGS[name]
    counted = packing._replace(unpack=lambda blocks: unpacked.append(packing.unpack(blocks)) or unpacked[-1])
    monkeypatch.setitem(packings.PACKINGS, name, counted)
    low_rank = randn(7, 2, seed=1), randn(2, 512, seed=2)
    stored = Stored(torch.from_numpy(random_blocks(name, 7, 512, seed=3)), None, name, low_rank)
    want = stored.values(torch.float32)[2:5, columns]
    unpacked.clear()
    torch.testing.assert_close(stored.values(torch.float32, slice(2, 5), columns), want)
    count = 512 if columns.start == 100 else want.shape[1]
    assert sum(t.numel() for t in unpacked) == 3 * count


def test_all_formats_are_tested():
    assert HALVES.keys() == gguf_blocks.BLOCKS.keys()
