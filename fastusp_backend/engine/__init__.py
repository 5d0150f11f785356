"""The model that is resident on the ranks, and its evaluations under a layout."""

from .denoiser import Denoiser
from .engine import Engine

__all__ = ["Denoiser", "Engine"]
