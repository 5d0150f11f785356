"""Attention over a sequence that the ranks share: local back ends, and USP around them."""

from .usp import ALL, ONLY_K, ONLY_Q, ONLY_V, JointAttention, Rope

__all__ = ["ALL", "ONLY_K", "ONLY_Q", "ONLY_V", "JointAttention", "Rope"]
