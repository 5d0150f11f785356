"""Draws what captions say: shapes of even colours with smooth edges, decided by a generator.

Lengths are in units of the picture's shorter edge, places in its width and height.
"""

import functools
import itertools
import zlib
from dataclasses import dataclass

import torch

from .captions import COLOURS, GROUNDS, KINDS, PLACES, RELATIONS, SIZES, Caption

PALETTE = {
    "red": (214, 40, 40),
    "green": (38, 160, 72),
    "blue": (42, 84, 216),
    "yellow": (244, 208, 52),
    "purple": (140, 60, 180),
    "orange": (244, 130, 36),
    "white": (246, 246, 246),
    "grey": (150, 150, 150),
    "black": (16, 16, 16),
}
"""sRGB, 0 to 255."""

RADII = (0.09, 0.13, 0.175)
"""Of a circle of each size; other shapes have the same area."""
CENTRES = ((0.5, 0.5), (0.25, 0.5), (0.75, 0.5), (0.5, 0.25), (0.5, 0.75))
"""x, y of one shape, by its place."""
PAIRS = (((0.25, 0.5), (0.75, 0.5)), ((0.75, 0.5), (0.25, 0.5)), ((0.5, 0.25), (0.5, 0.75)), ((0.5, 0.75), (0.5, 0.25)))
"""Of two, by their relation."""
WANDERING, GROWING = 0.015, 0.04
"""How far a centre is from these at the most, and how much larger or smaller a shape is."""


@dataclass(slots=True)
class Scenes:
    """B scenes. colours (B, 2) and ground (B,): numbers in PALETTE's order; kinds (B, 2); centres (B, 2, 2): x, y;
    radii (B, 2): 0 where there is one shape."""

    ground: torch.Tensor
    colours: torch.Tensor
    kinds: torch.Tensor
    centres: torch.Tensor
    radii: torch.Tensor


def middle(captions: list[Caption]) -> Scenes:
    """The scenes that captions tell, each shape in the middle of where it may be and of a middle size."""
    first_ground = list(PALETTE).index(GROUNDS[0])

    def pair(values: tuple, absent) -> list:
        return [*values, absent][:2]

    centres = [PAIRS[c.relation] if len(c.kind) == 2 else (CENTRES[c.place], (0.0, 0.0)) for c in captions]
    return Scenes(
        torch.tensor([first_ground + c.ground for c in captions]),
        torch.tensor([pair(c.colour, 0) for c in captions]),
        torch.tensor([pair(c.kind, 0) for c in captions]),
        torch.tensor(centres),
        torch.tensor([pair(tuple(RADII[size] for size in c.size), 0.0) for c in captions]),
    )


def vary(scenes: Scenes, generator: torch.Generator) -> Scenes:
    """The same scenes with shapes elsewhere and of other sizes, as far as their captions let them."""
    uniform = {"generator": generator, "device": scenes.radii.device}
    moved = scenes.centres + WANDERING * (2 * torch.rand(scenes.centres.shape, **uniform) - 1)
    grown = scenes.radii * (1 + GROWING * (2 * torch.rand(scenes.radii.shape, **uniform) - 1))
    return Scenes(scenes.ground, scenes.colours, scenes.kinds, moved, grown)


def draw(scenes: Scenes, height: int, width: int) -> torch.Tensor:
    """-> pictures (B, 3, height, width) from 0 to 1, the second shape above the first."""
    device = scenes.radii.device
    palette = torch.tensor(list(PALETTE.values()), dtype=torch.float32, device=device) / 255
    picture = palette[scenes.ground][:, :, None, None].expand(-1, -1, height, width)
    for i in range(2):
        inside = coverage(scenes.kinds[:, i], scenes.centres[:, i], scenes.radii[:, i], height, width)[:, None]
        picture = torch.lerp(picture, palette[scenes.colours[:, i]][:, :, None, None], inside)
    return picture


def coverage(kinds: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """kinds (B,), centres (B, 2), radii (B,) -> how much of each pixel a shape covers (B, height, width)."""
    edge = min(height, width)
    x = (torch.arange(width, device=radii.device) + 0.5)[None, None] - centres[:, 0, None, None] * width
    y = (torch.arange(height, device=radii.device) + 0.5)[None, :, None] - centres[:, 1, None, None] * height
    r = radii[:, None, None] * edge
    circle = (x.square() + y.square()).sqrt() - r
    square = torch.maximum(x.abs(), y.abs()) - 0.886 * r
    triangle = torch.maximum(y, 0.866 * x.abs() - 0.5 * y) - 0.777 * r
    distance = torch.where(kinds[:, None, None] == 0, circle, torch.where(kinds[:, None, None] == 1, square, triangle))
    return (0.5 - distance).clamp(0, 1) * (r > 0)


def all_captions() -> list[Caption]:
    """Every caption whose shapes have different colours."""
    shapes = list(itertools.product(range(len(SIZES)), range(len(COLOURS)), range(len(KINDS))))
    grounds = range(len(GROUNDS))
    one = [
        Caption((size,), (colour,), (kind,), place=place, ground=ground)
        for size, colour, kind in shapes
        for place in range(len(PLACES))
        for ground in grounds
    ]
    two = [
        Caption(*zip(first, second, strict=True), relation=relation, ground=ground)
        for first in shapes
        for second in shapes
        if first[1] != second[1]
        for relation in range(len(RELATIONS))
        for ground in grounds
    ]
    return one + two


def held_back(caption: Caption) -> bool:
    """Whether the model was not trained on a caption: one of ten."""
    return zlib.crc32(str(caption).encode()) % 10 == 0


@functools.cache
def _all_held_back() -> tuple[Caption, ...]:
    """Found once a process: that takes a quarter of a second, and `verify` asks for examples twice an option."""
    return tuple(caption for caption in all_captions() if held_back(caption))


def examples(count: int) -> list[Caption]:
    """Some captions that are held back, always the same ones."""
    held = _all_held_back()
    return [held[i] for i in torch.randperm(len(held), generator=torch.Generator().manual_seed(1))[:count].tolist()]
