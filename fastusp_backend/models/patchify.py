"""Between latents and image tokens of 2 x 2 latent pixels. Shapes: B batch, C channels, h w latents, S image tokens."""

import torch
import torch.nn.functional as F

PATCH = 2


def patch_grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches; odd sizes count as the next even ones."""
    return -(-height // PATCH), -(-width // PATCH)


def patchify(x: torch.Tensor) -> torch.Tensor:
    """x (B, C, h, w) -> (B, S, 4 C) in channel, row, column order; odd sizes are padded circularly, as ComfyUI pads
    them."""
    b, c, height, width = x.shape
    x = F.pad(x, (0, width % PATCH, 0, height % PATCH), mode="circular")
    x = x.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # B, C, rows, 2, columns, 2
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * PATCH**2)


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """tokens (B, S, 4 C), grid (rows, columns) -> (B, C, 2 rows, 2 columns)."""
    x = tokens.unflatten(1, grid).unflatten(3, (-1, PATCH, PATCH))  # B, rows, columns, C, 2, 2
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
