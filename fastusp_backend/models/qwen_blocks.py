"""The blocks of Qwen-Image and what they are made of, with its files' own key names.

Queries, keys and values are separate weights, so each travels while the next is computed; see flux_blocks.py for how a
block is a schedule.

Shapes: B batch, L tokens of this rank (text first: Lt, then the image's Li), C hidden.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..attention import ONLY_K, ONLY_Q, ONLY_V, JointAttention, Rope
from .beside import Beside
from .layers import Activations, Linear, RMSNorm, StreamModulation, timestep_embedding
from .segments import Segments


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.linear_1 = Linear(256, hidden)
        self.linear_2 = Linear(hidden, hidden)

    def forward(self, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """timesteps (n,) -> (n, C) in `dtype`."""
        return self.linear_2(F.silu(self.linear_1(timestep_embedding(timesteps, 256).to(dtype))))


class FeedForward(nn.Module):
    def __init__(self, hidden: int, mlp: int):
        super().__init__()
        self.net = nn.ModuleList([nn.ModuleDict({"proj": Linear(hidden, mlp)}), nn.Identity(), Linear(mlp, hidden)])

    def forward(self, x: Activations, ops: Segments) -> torch.Tensor:
        return self.net[2](ops.mlp_in(self.net[0]["proj"], x))


class Attention(nn.Module):
    """The projections around the joint attention: `to_*` and `norm_*` of the image, `add_*` and `norm_added_*` of the
    text."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        dim = hidden // heads
        self.to_q, self.to_k, self.to_v = (Linear(hidden, hidden) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (Linear(hidden, hidden) for _ in range(3))
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (RMSNorm(dim) for _ in range(4))
        self.to_out = nn.ModuleList([Linear(hidden, hidden)])
        self.to_add_out = Linear(hidden, hidden)

    def forward(
        self, txt: Activations, img: Activations, rope: tuple[Rope, Rope], joint: JointAttention, beside: Beside
    ) -> None:
        """Normed txt (B, Lt, C), img (B, Li, C), rope (text, image): attends, the text's tokens to be collected first,
        ahead of their output projections."""
        with beside.run(txt):
            projected = [layer(txt) for layer in (self.add_v_proj, self.add_k_proj, self.add_q_proj)]
        for layer, norm, which in (
            (self.to_v, None, ONLY_V),
            (self.to_k, self.norm_k, ONLY_K),
            (self.to_q, self.norm_q, ONLY_Q),
        ):
            joint.project(layer(img), (norm and norm.weight,), rope[1], which, text=False)
        beside.join()
        norms = (None, ONLY_V), (self.norm_added_k, ONLY_K), (self.norm_added_q, ONLY_Q)
        for tensor, (norm, which) in zip(projected, norms, strict=True):
            joint.project(tensor, (norm and norm.weight,), rope[0], which, image=False)
        joint.attend(text_first=True)


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, mlp: int):
        super().__init__()
        self.img_mod = nn.Sequential(nn.SiLU(), Linear(hidden, 6 * hidden))
        self.txt_mod = nn.Sequential(nn.SiLU(), Linear(hidden, 6 * hidden))
        self.attn = Attention(hidden, heads)
        self.img_mlp = FeedForward(hidden, mlp)
        self.txt_mlp = FeedForward(hidden, mlp)


def combine(
    x: torch.Tensor,
    attended: torch.Tensor,
    own: StreamModulation,
    following: tuple[torch.Tensor, torch.Tensor],
    mlp: FeedForward,
    ops: Segments,
    residual: torch.Tensor | None = None,
    *,
    last: bool = False,
) -> tuple[torch.Tensor, Activations]:
    """x and its projected attended tokens (B, L, C) -> (x, normed x), behind the block's MLP.

    own: the block's modulations for this stream.
    following: the (shift, scale) of the norm after the block.
    residual: what a ControlNet adds after the block.
    last: whether no block follows, so that what is normed is not quantised.
    """
    x, normed = ops.add_norm(x, attended, own.attention.gate, own.mlp.shift, own.mlp.scale)
    if residual is not None:
        x = x + residual
    return (ops.exact if last else ops).add_norm(x, mlp(normed, ops), own.mlp.gate, *following)
