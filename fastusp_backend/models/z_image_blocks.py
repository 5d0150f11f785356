"""The blocks of Z-Image and what they are made of, with its files' own key names.

A block is sandwiched: attention and feed-forward follow each other, and each is normed before it and behind it. Its
modulations are scales and gates, without shifts. See flux_blocks.py for how a block is a schedule.

Shapes: B batch, L tokens of this rank (text first), C hidden, D head dim = 128, M feed-forward width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..attention import IN_TURN, JointAttention, Rope
from ..kernels.place import rotate
from ..kernels.sandwich import EPS, swiglu_reference
from ..kernels.tokens import bounded
from .layers import Activations, Linear, RMSNorm
from .segments import Segments

QK_EPS = torch.finfo(torch.float32).eps
"""Of the norms of queries and keys, for which ComfyUI names none: torch's own then."""


class BlockModulation(NamedTuple):
    """A block's modulations, each (B, 1, C)."""

    attention_scale: torch.Tensor
    attention_gate: torch.Tensor
    mlp_scale: torch.Tensor
    mlp_gate: torch.Tensor


class Attention(nn.Module):
    """The projections around an attention."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.hidden, dim = hidden, hidden // heads
        self.qkv = Linear(hidden, 3 * hidden, bias=False)
        self.out = Linear(hidden, hidden, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(dim, QK_EPS) for _ in range(2))

    def project(self, normed: Activations, rope: Rope, joint: JointAttention, *, text: bool) -> None:
        """v, k, q one after the other: each travels while the next is computed."""
        scales = self.q_norm.weight, self.k_norm.weight, None
        for which in IN_TURN:
            rows = slice(which.start * self.hidden, which.stop * self.hidden)
            joint.project(self.qkv(normed, rows), scales[which], rope, which, text=text)

    def forward(self, normed: torch.Tensor, rope: Rope) -> torch.Tensor:
        """normed (B, T, C), whole on this rank, to itself."""
        q, k, v = self.qkv(normed).unflatten(-1, (3, -1, self.q_norm.weight.numel())).unbind(2)
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        attended = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return self.out(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, hidden: int, mlp: int):
        super().__init__()
        self.w1 = Linear(hidden, mlp, bias=False)
        self.w2 = Linear(mlp, hidden, bias=False)
        self.w3 = Linear(hidden, mlp, bias=False)

    def forward(self, x: Activations, ops: Segments) -> torch.Tensor:
        return self.w2(ops.swiglu(self.w1(x), self.w3(x)))


class Sandwich(nn.Module):
    """What a block is without modulations."""

    def __init__(self, hidden: int, heads: int, mlp: int):
        super().__init__()
        self.attention = Attention(hidden, heads)
        self.feed_forward = FeedForward(hidden, mlp)
        self.attention_norm1, self.attention_norm2 = (RMSNorm(hidden, EPS) for _ in range(2))
        self.ffn_norm1, self.ffn_norm2 = (RMSNorm(hidden, EPS) for _ in range(2))


class ContextBlock(Sandwich):
    """Of the text alone, which it takes whole, once a prompt: as torch's separate operations."""

    def forward(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.attention_norm2(bounded(self.attention(self.attention_norm1(x), rope)))
        mlp, normed = self.feed_forward, self.ffn_norm1(x)
        return x + self.ffn_norm2(mlp.w2(swiglu_reference(mlp.w1(normed), mlp.w3(normed))))


class Block(Sandwich):
    """Of the image's tokens, or of text and image."""

    def __init__(self, hidden: int, heads: int, mlp: int, modulation: int):
        super().__init__(hidden, heads, mlp)
        self.adaLN_modulation = nn.ModuleList([Linear(modulation, 4 * hidden)])

    def forward(
        self,
        x: torch.Tensor,
        normed: Activations,
        own: BlockModulation,
        end: tuple[RMSNorm, torch.Tensor] | None,
        rope: Rope,
        joint: JointAttention,
        ops: Segments,
        *,
        text: bool = True,
    ) -> tuple[torch.Tensor, Activations | None]:
        """x (B, L, C) and it normed -> the same behind this block.

        own: its modulations.
        end: the norm that follows and its scale; None where none does, so that of the image's tokens alone, not normed.
        text: whether x has text, and attention does.
        """
        self.attention.project(normed, rope, joint, text=text)
        joint.attend(image_only=not text)
        attended = joint.collect() if text and end is not None else joint.collect_image()
        x = x[:, -attended.shape[1] :]
        projected = self.attention.out(ops.activations(attended))
        x, normed = ops.normed_add_norm(
            x, projected, self.attention_norm2, own.attention_gate, self.ffn_norm1, own.mlp_scale
        )
        mlp = self.feed_forward(normed, ops)
        if end is None:
            return ops.normed_add(x, mlp, self.ffn_norm2, own.mlp_gate), None
        return ops.normed_add_norm(x, mlp, self.ffn_norm2, own.mlp_gate, *end)
