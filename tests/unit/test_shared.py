"""Tensors in shared memory: every type comes back as it was, whatever its neighbours' widths."""

import os

import pytest
import torch
from safetensors.torch import load

from fastusp_backend.errors import ProtocolError
from fastusp_backend.protocol import map_tensors, share_tensors

pytestmark = pytest.mark.unit

TYPES = (torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.int16, torch.bfloat16, torch.float16)
TYPES += (torch.int8, torch.int32, torch.float32, torch.int64, torch.float64)


def test_every_type_and_shape():
    tensors = {f"{dtype}": torch.arange(5).to(dtype) for dtype in TYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "matrix": torch.randn(3, 7), "": torch.ones(1)}
    fd = share_tensors(tensors)
    try:
        got = map_tensors(fd)
        same_by_library = load(os.pread(fd, 1 << 20, 0))
    finally:
        os.close(fd)
    for name, wanted in tensors.items():
        for t in (got[name], same_by_library[name]):
            assert t.dtype == wanted.dtype and t.shape == wanted.shape
            assert torch.equal(t.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)), name


def test_a_type_that_does_not_travel_is_named():
    with pytest.raises(ProtocolError, match="'z' is torch.complex64"):
        share_tensors({"z": torch.zeros(2, dtype=torch.complex64)})
