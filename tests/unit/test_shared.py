"""Tensors in shared memory: every type comes back as it was, whatever its neighbours' widths."""

import pytest
import torch

from fastusp_backend.errors import ProtocolError
from fastusp_backend.protocol.shared import SharedMemory, SharedTensors, placed, put

pytestmark = pytest.mark.unit

TYPES = (torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.int16, torch.bfloat16, torch.float16)
TYPES += (torch.int8, torch.int32, torch.float32, torch.int64, torch.float64)


def test_every_type_and_shape():
    tensors = {f"{dtype}": torch.arange(5).to(dtype) for dtype in TYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "matrix": torch.randn(3, 7), "": torch.ones(1)}
    tensors |= {"transposed": torch.randn(3, 7).T, "expanded": torch.randn(1, 3).expand(4, 3)}
    places, size = placed(tensors)
    memory = SharedMemory.made(size)
    put(tensors, places, memory.bytes)
    got = SharedTensors(SharedMemory(memory.fd, lasting=True), places)
    assert got.keys() == tensors.keys()
    for name, wanted in tensors.items():
        t = got[name]
        assert t.dtype == wanted.dtype and t.shape == wanted.shape
        assert torch.equal(t.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)), name


def test_a_type_that_does_not_travel_is_named():
    with pytest.raises(ProtocolError, match="'z' is torch.complex64"):
        placed({"z": torch.zeros(2, dtype=torch.complex64)})
