"""Attention over a sequence that the ranks share: local back ends (local), and USP around them (usp).

Shapes in docstrings, here and in comm, kernels, models and engine, are written in these letters:

| letter | what it counts |
|---|---|
| B | prompts or images of one evaluation |
| L = Lt + Li | tokens of this rank, [text, image], with padding (comm/shards) |
| N = U L | tokens that a Ulysses group gathers, [all its text, all its image], with padding |
| R | some rows of these: one stream's, or any part |
| H, h = H / U | heads of the model; those that this rank attends |
| D | values of a head |
| C = H D | values of a token inside the transformer |
| T | tensors, of q, k and v |
| U | ranks of a Ulysses group (comm/mesh) |
| P | ranks of whatever group it is |
| *row | the shape of a token's row on the wire: (h, D), or (pitch,) bytes (comm/wire) |

Latents are no tokens yet: theirs are (B, C, h, w), channels, height and width. Where queries and keys differ in number
they are Lq and Lk. Heads, then their values, are the last dimensions, as matrix products give them.
"""

from .usp import ALL, IN_TURN, ONLY_K, ONLY_Q, ONLY_V, JointAttention, Rope

__all__ = ["ALL", "IN_TURN", "ONLY_K", "ONLY_Q", "ONLY_V", "JointAttention", "Rope"]
