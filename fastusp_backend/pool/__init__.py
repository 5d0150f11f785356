"""The client side: start worker processes, submit work to them, watch them, end them."""

from .pool import Pool, Progress
from .session import Mask, Prompt, Session

__all__ = ["Mask", "Pool", "Progress", "Prompt", "Session"]
