"""The denoise step: what one evaluation of the model is on the ranks of a layout."""

from .denoiser import Denoiser
from .engine import Engine

__all__ = ["Denoiser", "Engine"]
