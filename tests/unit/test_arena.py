"""Where the tensors of an arena lie."""

from types import SimpleNamespace

import pytest
import torch

from fastusp_backend.comm.arena import carve

pytestmark = pytest.mark.unit


def test_regions_lie_apart_and_begin_where_any_type_and_vector_may():
    asked = []
    shapes = [((3,), torch.uint8), ((2, 5), torch.bfloat16), ((256,), torch.uint8), ((1,), torch.float32)]
    regions = carve(SimpleNamespace(reserve=asked.append), shapes)
    assert [region.offset for region in regions] == [0, 256, 512, 768] and asked == [1024]
