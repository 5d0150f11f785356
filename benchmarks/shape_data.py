"""The pictures and captions that train_shapes.py trains on."""

import torch

from fastusp_backend.shapes import captions, encode
from fastusp_backend.shapes.scenes import Scenes, all_captions, draw, held_back, middle, vary

ONE_SHAPE = 0.2
"""Share of pictures with one shape."""


class ShapeData:
    """Pictures of captions that are not held back, drawn on the device. quick: the size, (height, width) in pixels, for
    which drawing is worth compiling on a GPU."""

    def __init__(self, device: torch.device, seed: int, quick: tuple[int, int]):
        self._quick = quick
        self._draw = torch.compile(_drawn, dynamic=False) if device.type == "cuda" else _drawn
        self.generator = torch.Generator(device).manual_seed(seed)
        known = [caption for caption in all_captions() if not held_back(caption)]
        self._scenes = {name: getattr(middle(known), name).to(device) for name in Scenes.__slots__}
        self._tokens = torch.tensor([captions.numbers(caption) for caption in known], device=device)
        single = self._scenes["radii"][:, 1] == 0
        self._until = torch.where(single, ONE_SHAPE / single.sum(), (1 - ONE_SHAPE) / (~single).sum()).cumsum(0)

    def batch(self, count: int, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """-> latents (count, 16, h, w), tokens (count, TOKENS)."""
        uniform = torch.rand(count, generator=self.generator, device=self._until.device)
        chosen = torch.searchsorted(self._until, uniform).clamp_(max=len(self._until) - 1)
        scenes = Scenes(**{name: values[chosen] for name, values in self._scenes.items()})
        drawing = self._draw if size == self._quick else _drawn
        return drawing(vary(scenes, self.generator), *size), self._tokens[chosen]


def _drawn(scenes: Scenes, height: int, width: int) -> torch.Tensor:
    return encode(draw(scenes, height, width))
