"""Latents become tokens and latents again, also where patches do not divide them."""

import pytest
import torch

from fastusp_backend.models.patchify import patch_grid, patchify, unpatchify

pytestmark = pytest.mark.unit


def test_what_patches_do_not_divide_goes_on_at_the_other_edge():
    x = torch.arange(2.0 * 2 * 3 * 5).view(2, 2, 3, 5)
    tokens, grid = patchify(x, 2), patch_grid(3, 5, 2)
    assert grid == (2, 3) and tokens.shape == (2, 6, 8)
    for n in range(6):
        rows, columns = [2 * (n // 3), (2 * (n // 3) + 1) % 3], [2 * (n % 3), (2 * (n % 3) + 1) % 5]
        assert torch.equal(tokens[:, n], x[:, :, rows][..., columns].flatten(1))
    assert torch.equal(unpatchify(tokens, grid, 2)[..., :3, :5], x)
