"""Pinned host memory."""

import pytest
import torch

from fastusp_backend.pinning import pin, unpin

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_memory_is_pinned_once_and_a_failure_is_not_blamed_on_the_next_kernel():
    memory = torch.arange(1 << 20, dtype=torch.uint8)
    assert pin(memory) == 0
    try:
        assert memory.is_pinned()
        assert pin(memory) != 0  # it is already
        assert torch.ones(8, device="cuda").sum().item() == 8
        assert torch.equal(memory.to("cuda", non_blocking=True).cpu(), memory)
    finally:
        assert unpin(memory.data_ptr()) == 0
    assert unpin(memory.data_ptr()) != 0
    assert torch.ones(8, device="cuda").sum().item() == 8
