"""The blocks of Stable Diffusion 3 and what they are made of, with the names of its original key layout.

See flux_blocks.py for how a block is a schedule.

Shapes: B batch, L tokens of this rank (text first: Lt, then the image's Li), C hidden, D head dim = 64, M mlp width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..attention import ALL, IN_TURN, ONLY_K, ONLY_Q, ONLY_V, JointAttention
from .layers import Activations, Linear, ModulationOut, RMSNorm, StreamModulation
from .segments import Segments

Norm = tuple[torch.Tensor, torch.Tensor]
"""The (shift, scale) of a norm, each (B, 1, C)."""


class BlockModulation(NamedTuple):
    """A block's modulations.

    text_norm: of the text's norm ahead of attention.
    text: the text's, None in the last block.
    image: the image's.
    second: those around the image's own attention, None in a block without one.
    """

    text_norm: Norm
    text: StreamModulation | None
    image: StreamModulation
    second: ModulationOut | None


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockConfig:
    """How a block is made.

    hidden: width of a token.
    heads: the number of attention heads.
    mlp: width behind gelu.
    normed: whether queries and keys are.
    second: whether the image's tokens attend to each other once more.
    last: whether no block follows, so that nothing is made of the text's attended tokens.
    """

    hidden: int
    heads: int
    mlp: int
    normed: bool
    second: bool
    last: bool


class Embedder(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.mlp = nn.Sequential(Linear(width, hidden), nn.SiLU(), Linear(hidden, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


class PatchEmbedder(nn.Module):
    """A convolution over patches that do not overlap: a product with each patch."""

    def __init__(self, channels: int, patch: int, hidden: int):
        super().__init__()
        values = {"weight": torch.empty(hidden, channels, patch, patch), "bias": torch.empty(hidden)}
        self.proj = nn.ParameterDict({name: nn.Parameter(v, requires_grad=False) for name, v in values.items()})

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """patches (B, L, p^2 channels) in channel, row, column order -> (B, L, C)."""
        weight, bias = (self.proj[name].to(patches.dtype) for name in ("weight", "bias"))
        return F.linear(patches, weight.flatten(1), bias)


class Attention(nn.Module):
    """The projections around an attention. output: whether anything is made of what it gives."""

    def __init__(self, hidden: int, heads: int, *, normed: bool, output: bool = True):
        super().__init__()
        self.hidden = hidden
        self.qkv = Linear(hidden, 3 * hidden)
        self.proj = Linear(hidden, hidden) if output else None
        self.ln_q, self.ln_k = (RMSNorm(hidden // heads) if normed else None for _ in range(2))

    @property
    def scales(self) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """For q, k and v, as `JointAttention.project` takes them."""
        return self.ln_q and self.ln_q.weight, self.ln_k and self.ln_k.weight, None

    def project_image(self, normed: Activations, joint: JointAttention, order: tuple[slice, ...] = IN_TURN) -> None:
        """One after the other, right for a long stream: each travels while the next is computed."""
        for which in order:
            rows = slice(which.start * self.hidden, which.stop * self.hidden)
            joint.project(self.qkv(normed, rows), self.scales[which], None, which, text=False)


class FeedForward(nn.Module):
    def __init__(self, hidden: int, mlp: int):
        super().__init__()
        self.fc1 = Linear(hidden, mlp)
        self.fc2 = Linear(mlp, hidden)

    def forward(self, x: Activations, ops: Segments) -> torch.Tensor:
        return self.fc2(ops.mlp_in(self.fc1, x))


class StreamBlock(nn.Module):
    """One stream's half of a block. output: whether its attended tokens are computed with; else it gives two
    modulations, with a second attention nine."""

    def __init__(self, config: BlockConfig, *, second: bool = False, output: bool = True):
        super().__init__()
        hidden, heads = config.hidden, config.heads
        self.attn = Attention(hidden, heads, normed=config.normed, output=output)
        self.attn2 = Attention(hidden, heads, normed=config.normed) if second else None
        self.mlp = FeedForward(hidden, config.mlp) if output else None
        self.parts = 2 if not output else 9 if second else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden, self.parts * hidden))


class JointBlock(nn.Module):
    def __init__(self, config: BlockConfig):
        super().__init__()
        self.context_block = StreamBlock(config, output=not config.last)
        self.x_block = StreamBlock(config, second=config.second)

    def forward(
        self,
        txt: torch.Tensor,
        img: torch.Tensor,
        txt_normed: Activations,
        img_normed: Activations,
        own: BlockModulation,
        txt_end: Norm | None,
        img_end: Norm,
        joint: JointAttention,
        ops: Segments,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, Activations, Activations]:
        """txt (B, Lt, C), img (B, Li, C) and both normed -> the same behind this block.

        own: its modulations.
        txt_end, img_end: those of the norms behind it; None where nothing reads the text any more, so that its half is
            left out.
        residual: what a ControlNet adds after it, (B or 1, Li, C).
        """
        text, image = self.context_block, self.x_block
        with ops.beside.run(txt_normed):
            txt_qkv = text.attn.qkv(txt_normed)
        image.attn.project_image(img_normed, joint)
        ops.beside.join()
        joint.project(txt_qkv, text.attn.scales, None, ALL, image=False)
        second = None if own.second is None else ops.norm(img, own.second.shift, own.second.scale)
        joint.attend(text_first=True)
        if txt_end is not None:
            attended = joint.collect_text()
            with ops.beside.run(txt, attended):
                projected = text.attn.proj(ops.activations(attended))
                txt, txt_normed = _combine(txt, projected, own.text, txt_end, text.mlp, ops)
        attended, gate = joint.collect_image(), own.image.attention.gate
        if second is not None:
            image.attn2.project_image(second, joint, (ONLY_V, ONLY_K))
        projected = image.attn.proj(ops.activations(attended))  # while the second attention's tokens travel
        if second is not None:
            # Only now: with all of q, k and v, other ranks would give back their next tokens to where these lay.
            image.attn2.project_image(second, joint, (ONLY_Q,))
            joint.attend(image_only=True)
            img, gate = ops.add(img, projected, gate), own.second.gate  # while its attended tokens travel
            projected = image.attn2.proj(ops.activations(joint.collect_image()))
        after = ops if txt_end is not None else ops.exact
        img, img_normed = _combine(img, projected, own.image, img_end, image.mlp, ops, gate, residual, after)
        ops.beside.join()
        return txt, img, txt_normed, img_normed


def _combine(
    x: torch.Tensor,
    attended: torch.Tensor,
    own: StreamModulation,
    end: Norm,
    mlp: FeedForward,
    ops: Segments,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    after: Segments | None = None,
) -> tuple[torch.Tensor, Activations]:
    """x and its projected attended tokens (B, L, C) -> (x, x as the norm with `end` gives it), behind the block's MLP.

    gate: of the attended tokens, where it is not the first attention's.
    residual: is added behind the MLP.
    after: how that is normed, where not as within the block.
    """
    gate = own.attention.gate if gate is None else gate
    x, normed = ops.add_norm(x, attended, gate, own.mlp.shift, own.mlp.scale)
    if residual is not None:
        x = x + residual
    return (after or ops).add_norm(x, mlp(normed, ops), own.mlp.gate, *end)
