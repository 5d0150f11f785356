"""Looks in a picture for what its caption says: colours, places, kinds and sizes, told by pixels alone."""

import math

import torch

from .captions import COLOURS, GROUNDS, KINDS, SIZES, Caption
from .scenes import PALETTE, RADII, coverage, middle

_NEAR = 0.12
"""How far a shape's centre may be from the middle of its place."""
_ALIKE = 0.7
"""Intersection by union of a shape's pixels with those of the kind, at the least."""


def unmet(caption: Caption, picture: torch.Tensor) -> list[str]:
    """picture (3, h, w) from 0 to 1 -> what is not as the caption says, in words; empty where all is."""
    height, width = picture.shape[-2:]
    palette = torch.tensor(list(PALETTE.values())) / 255
    nearest = torch.cdist(picture.float().flatten(1).T, palette).argmin(1).view(height, width)
    told, failures = middle([caption]), []
    shapes = torch.zeros(height, width, dtype=torch.bool)
    for i in range(len(caption.kind)):
        name = f"{COLOURS[caption.colour[i]]} {KINDS[caption.kind[i]]}"
        mask = nearest == caption.colour[i]
        if len(caption.kind) == 2:  # the rim of the other shape may have this one's colour
            mask &= _own_half(caption.relation, i, height, width)
        shapes |= mask
        if (problem := _problem(caption, i, mask, told.centres[0, i])) is not None:
            failures.append(f"the {name} {problem}")
    ground = (nearest == list(PALETTE).index(GROUNDS[caption.ground])) & ~shapes
    if ground.sum() < 0.9 * (~shapes).sum():
        failures.append(f"the background is not {GROUNDS[caption.ground]}")
    return failures


def psnr(pictures: torch.Tensor, wanted: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures (B, 3, h, w) from 0 to 1: infinite where they are equal."""
    return -10 * (pictures - wanted).square().mean().log10().item()


def _problem(caption: Caption, i: int, mask: torch.Tensor, place: torch.Tensor) -> str | None:
    height, width = mask.shape
    area = mask.sum().item()
    radius = math.sqrt(area / math.pi) / min(height, width)
    if radius < RADII[0] / 2:
        return "is not there"
    y, x = mask.nonzero().float().add(0.5).mean(0).tolist()
    centre = torch.tensor([[x / width, y / height]])
    if (centre[0] - place).abs().max() > _NEAR:
        return "is elsewhere"
    limits = [math.sqrt(a * b) for a, b in zip(RADII, RADII[1:], strict=False)]
    size = sum(radius > limit for limit in limits)
    if size != caption.size[i]:
        return f"is {SIZES[size] or 'of middle size'}"
    kinds = torch.arange(len(KINDS))
    drawn = coverage(kinds, centre.expand(len(kinds), 2), torch.full((len(kinds),), radius), height, width) > 0.5
    alike = (drawn & mask).sum((1, 2)) / (drawn | mask).sum((1, 2))
    if alike.argmax() != caption.kind[i]:
        return f"is a {KINDS[alike.argmax()]}"
    return None if alike.max() > _ALIKE else "has no shape"


def _own_half(relation: int, i: int, height: int, width: int) -> torch.Tensor:
    """The half of the picture in which the first (i = 0) or second of two shapes is."""
    y, x = torch.meshgrid(torch.arange(height) < height / 2, torch.arange(width) < width / 2, indexing="ij")
    low = x if relation < 2 else y
    return low if (relation % 2 == 0) == (i == 0) else ~low
