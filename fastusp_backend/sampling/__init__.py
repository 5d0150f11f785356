"""Sampling loops as pure functions: they know the model as f(x, sigma) -> denoised, and nothing of ranks."""

from .cache import Cache
from .guidance import GuidedModel
from .samplers import SAMPLERS, Sampler, StepState

__all__ = ["SAMPLERS", "Cache", "GuidedModel", "Sampler", "StepState"]
