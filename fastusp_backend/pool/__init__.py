"""The client side: start worker processes, submit work to them, watch them, end them."""

from .pool import Pool, Progress

__all__ = ["Pool", "Progress"]
