"""Between latents and image tokens of p x p latent pixels. Shapes: B batch, C channels, h w latents, S image tokens."""

import torch
import torch.nn.functional as F


def patch_grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """Rows and columns of patches; sizes that they do not divide count as the next that they do."""
    return -(-height // patch), -(-width // patch)


def patchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """x (B, C, h, w) -> (B, S, p^2 C) in channel, row, column order; what the patches do not divide is padded
    circularly, as ComfyUI pads it."""
    b, c, height, width = x.shape
    x = F.pad(x, (0, -width % patch, 0, -height % patch), mode="circular")
    x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B, C, rows, p, columns, p
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch**2)


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int], patch: int) -> torch.Tensor:
    """tokens (B, S, p^2 C), grid (rows, columns) -> (B, C, p rows, p columns)."""
    x = tokens.unflatten(1, grid).unflatten(3, (-1, patch, patch))  # B, rows, columns, C, p, p
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
