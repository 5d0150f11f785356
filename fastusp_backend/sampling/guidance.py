"""From a velocity model to the denoiser that samplers call: rectified flow, classifier-free guidance, masks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..prompt import Inpainting
from .cache import Cache

Velocities = Callable[[torch.Tensor, torch.Tensor, list], list[torch.Tensor]]
"""(x (B, C, h, w), timestep (B,), conditionings) -> a velocity, as x, for each of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidedModel:
    """denoised = model(x, sigma) in float32, for x = sigma noise + (1 - sigma) image (rectified flow, arXiv
    2209.03003).

    velocities: the model.
    positive, negative: the prompts; without a negative one there is no guidance.
    cfg: the guidance scale.
    timestep_scale: the model's timestep per sigma.
    inpainting: the mask, if there is one.
    cache: what skips evaluations; LazyCache's rule skips guided ones as a whole.
    """

    velocities: Velocities
    positive: object
    negative: object | None
    cfg: float
    timestep_scale: float
    inpainting: Inpainting | None = None
    cache: Cache | None = None

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """x (B, C, h, w) float32, sigma () -> denoised, as x."""
        keep = self.inpainting
        if keep is not None:
            known = sigma * keep.noise + (1 - sigma) * keep.latent_image
            x = x * keep.mask + known * (1 - keep.mask)
        if self.cache is not None and self.cache.skips_guided:
            (denoised,) = self.cache(x, sigma, lambda: [self._guided(x, sigma, None)])
        else:
            denoised = self._guided(x, sigma, self.cache)
        if keep is not None:
            denoised = denoised * keep.mask + keep.latent_image * (1 - keep.mask)
        return denoised

    def _guided(self, x: torch.Tensor, sigma: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        prompts = [self.positive] if self.negative is None else [self.positive, self.negative]
        timestep = (sigma * self.timestep_scale).expand(x.shape[0])  # on sigma's device, the CPU

        def evaluate() -> list[torch.Tensor]:
            return self.velocities(x, timestep, prompts)

        velocities = evaluate() if cache is None else cache(x, sigma, evaluate)
        denoised, *without = (x - v.float() * sigma for v in velocities)
        if without:
            denoised = without[0] + (denoised - without[0]) * self.cfg  # arXiv 2207.12598
        return denoised
