"""Where image tokens lie for rotary embeddings: the image's own grid, and those of its reference images.

A token has three positions: image, row and column. Shapes: S tokens of the image, R of all its references.
"""

from typing import NamedTuple

import torch

from .patchify import patch_grid

METHODS = ("offset", "index", "negative_index", "index_timestep_zero", "uxo")
"""How references are told from the image, which is image 0, and from each other, by ComfyUI's names.

offset: all are image 1, beside one another.
index: they are images 1, 2, ...
negative_index: they are images -1, -2, ...
index_timestep_zero: as index, and their tokens are modulated as at timestep 0.
uxo: all are image 0, each behind the last corner of the one before.
"""


class References(NamedTuple):
    """A prompt's reference images.

    patch: latent pixels of a patch's edge.
    sizes: (h, w) of each reference latent.
    method: one of METHODS.
    """

    patch: int
    sizes: tuple[tuple[int, int], ...] = ()
    method: str = "offset"

    @property
    def tokens(self) -> int:
        return sum(rows * columns for rows, columns in self.grids)

    @property
    def grids(self) -> list[tuple[int, int]]:
        return [patch_grid(*size, self.patch) for size in self.sizes]

    @property
    def at_timestep_zero(self) -> bool:
        return bool(self.sizes) and self.method == "index_timestep_zero"


def image_positions(
    grid: tuple[int, int], references: References, device: torch.device, *, centred: bool = False, spacing: int = 1
) -> torch.Tensor:
    """(S + R, 3) for an image of grid (rows, columns) and the references that follow it.

    centred: rows and columns count from the middle, n // 2 of n, of their own image.
    spacing: the distance from one image to the next, where `index` places them.
    """
    images = [_positions(grid, (0, 0, 0), device, centred=centred)]
    for own, start in zip(references.grids, _starts(grid, references, spacing), strict=True):
        images.append(_positions(own, start, device, centred=centred))
    return torch.cat(images)


def _positions(grid, start: tuple[int, int, int], device: torch.device, *, centred: bool) -> torch.Tensor:
    """(tokens, 3) of one image whose first token lies at `start`, before it is centred."""
    image, *corner = start
    sides = [
        torch.arange(n, device=device) + (first - n // 2 if centred else first)
        for n, first in zip(grid, corner, strict=True)
    ]
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([torch.full_like(rows, image), rows, columns], dim=-1).flatten(0, 1)


def _starts(grid: tuple[int, int], references: References, spacing: int) -> list[tuple[int, int, int]]:
    """Each reference's (image, row, column), as ComfyUI places it."""
    patch, sizes, method = references

    def tokens(pixels: int) -> int:
        return -(-pixels // patch)

    if method in ("index", "index_timestep_zero", "negative_index"):
        step = -spacing if method == "negative_index" else spacing
        return [(step * number, 0, 0) for number in range(1, len(sizes) + 1)]
    starts, height, width = [], 0, 0  # of what has been placed, in latent pixels
    for h, w in sizes:
        if method == "uxo":
            starts.append((0, grid[0] + tokens(height), grid[1] + tokens(width)))
            height, width = height + h, width + w
            continue
        beside = h + height > w + width  # grow along the shorter side
        row, column = (0, width) if beside else (height, 0)
        starts.append((1, tokens(row), tokens(column)))
        height, width = max(height, h + row), max(width, w + column)
    return starts
