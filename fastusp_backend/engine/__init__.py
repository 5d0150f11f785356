"""The model that is resident on the ranks, and its evaluations under a layout."""

from .denoiser import Denoiser
from .engine import Engine
from .first_block import FirstBlockCache
from .warming import Warming

__all__ = ["Denoiser", "Engine", "FirstBlockCache", "Warming"]
