"""Attention over a sequence that the ranks share. Models make one call, `USPAttention`."""

from .usp import USPAttention

__all__ = ["USPAttention"]
