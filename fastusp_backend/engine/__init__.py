"""The denoise step: what one evaluation of the model is on the ranks of a layout."""

from .batch import BatchedDenoiser
from .denoiser import Denoiser
from .engine import Engine

__all__ = ["BatchedDenoiser", "Denoiser", "Engine"]
