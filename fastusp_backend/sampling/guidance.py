"""From a velocity model to the denoiser that samplers call: rectified flow, classifier-free guidance, masks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Velocity = Callable[[torch.Tensor, torch.Tensor, object], torch.Tensor]
"""(x (B, C, h, w), timestep (B,), conditioning) -> velocity, as x."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inpainting:
    """mask (broadcastable to x): 1 where the image is sampled, 0 where `latent_image` is kept; noise: as x."""

    mask: torch.Tensor
    latent_image: torch.Tensor
    noise: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidedModel:
    """denoised = model(x, sigma) in float32, for x = sigma noise + (1 - sigma) image (rectified flow, arXiv
    2209.03003).

    negative None leaves guidance out. timestep_scale: the model's timestep per sigma.
    """

    velocity: Velocity
    positive: object
    negative: object | None
    cfg: float
    timestep_scale: float
    inpainting: Inpainting | None = None

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """x (B, C, h, w) float32, sigma () -> denoised, as x."""
        keep = self.inpainting
        if keep is not None:
            known = sigma * keep.noise + (1 - sigma) * keep.latent_image
            x = x * keep.mask + known * (1 - keep.mask)
        denoised = self._denoise(x, sigma, self.positive)
        if self.negative is not None:
            without = self._denoise(x, sigma, self.negative)
            denoised = without + (denoised - without) * self.cfg  # arXiv 2207.12598
        if keep is not None:
            denoised = denoised * keep.mask + keep.latent_image * (1 - keep.mask)
        return denoised

    def _denoise(self, x: torch.Tensor, sigma: torch.Tensor, conditioning: object) -> torch.Tensor:
        timestep = (sigma * self.timestep_scale).expand(x.shape[0])  # on sigma's device, the CPU
        return x - self.velocity(x, timestep, conditioning).float() * sigma
