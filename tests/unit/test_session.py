"""What a session makes of its arguments."""

import pytest
import torch

from fastusp_backend.pool.session import _distinct

pytestmark = pytest.mark.unit


def test_equal_control_travels_once():
    """ComfyUI adds up two ControlNets' tensors block by block, and expands one over a batch."""
    residuals = [torch.full((2, 4, 8), value) for value in (1.0, 2.0, 1.0)]
    residuals[1][0, 0] = 1  # begins like the others
    expanded = torch.ones(1, 4, 8).expand(2, 4, 8)
    places, tensors = _distinct({"input": [*residuals, expanded], "output": [None, expanded]}, torch.float32)
    assert places == {"input": [0, 1, 0, 2], "output": [None, 2]}
    assert [len(t) for t in tensors.values()] == [2, 2, 1]
    assert torch.equal(tensors["control.1"], residuals[1])
    for other in (torch.ones(2, 4, 8).double(), torch.ones(2, 8, 4), torch.tensor(1.0), torch.empty(0, 4, 8)):
        assert _distinct({"input": [residuals[0], other]}, torch.float32)[0] == {"input": [0, 1]}
