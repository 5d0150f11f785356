"""What the families' layers have in common, written out."""

import math

import pytest
import torch

from fastusp_backend.models.layers import rope_tables

pytestmark = pytest.mark.unit


def test_rotary_tables_are_exact_at_large_positions():
    """In float32 an angle of 4096 has an error of 1e-4, and so have its cosine and sine."""
    cos, sin = rope_tables(torch.tensor([[4096, 3]]), (8, 4), 10_000.0)
    angles = [4096 * 10_000 ** (-i / 8) for i in range(0, 8, 2)] + [3 * 10_000 ** (-i / 4) for i in range(0, 4, 2)]
    assert cos[0].tolist() == pytest.approx([math.cos(angle) for angle in angles], abs=2e-7)
    assert sin[0].tolist() == pytest.approx([math.sin(angle) for angle in angles], abs=2e-7)
