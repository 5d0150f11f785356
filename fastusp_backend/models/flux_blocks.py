"""The blocks of FLUX.1, FLUX.2 and Chroma and what they are made of, with the names of the original (BFL) key layout.

The blocks are schedules: they start an exchange as soon as its payload exists and compute what does not need it before
they await it. Each residual addition is fused with the next block's norm, so blocks pass on (x, normed x).

Shapes: B batch, L tokens of this rank (text first), C hidden, H heads, D head dim = 128, M mlp width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..attention import ALL, IN_TURN, JointAttention, Rope
from .layers import Activations, HeadNorm, Linear, StreamModulation
from .segments import Segments


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockConfig:
    """How blocks are made.

    hidden: width of a token.
    heads: the number of attention heads.
    mlp: width behind the activation.
    bias: whether layers have one.
    gated: SwiGLU for gelu, so that an MLP's first layer gives 2 M values.
    modulated: whether each block has modulations of its own.
    """

    hidden: int
    heads: int
    mlp: int
    bias: bool
    gated: bool
    modulated: bool

    @property
    def mlp_in_features(self) -> int:
        """Outputs of an MLP's first layer."""
        return 2 * self.mlp if self.gated else self.mlp


class Embedder(nn.Module):
    def __init__(self, width: int, hidden: int, *, bias: bool):
        super().__init__()
        self.in_layer = Linear(width, hidden, bias=bias)
        self.out_layer = Linear(hidden, hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """The layer that gives `parts` shifts, scales and gates of C each."""

    def __init__(self, hidden: int, parts: int, *, bias: bool):
        super().__init__()
        self.lin = Linear(hidden, parts * hidden, bias=bias)


class QKNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.query_norm = HeadNorm(dim)
        self.key_norm = HeadNorm(dim)

    @property
    def scales(self) -> tuple[torch.Tensor, torch.Tensor, None]:
        """For q, k and v, as `JointAttention.project` takes them."""
        return self.query_norm.scale, self.key_norm.scale, None


class SelfAttention(nn.Module):
    def __init__(self, config: BlockConfig):
        super().__init__()
        hidden = config.hidden
        self.qkv = Linear(hidden, 3 * hidden, bias=config.bias)
        self.norm = QKNorm(hidden // config.heads)
        self.proj = Linear(hidden, hidden, bias=config.bias)


class StreamBlock(nn.Module):
    """One stream's half of a double block. Its tensors are named img_* or txt_* in the file: see
    `FluxTransformer.module_key`."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.hidden, self.gated, bias = config.hidden, config.gated, config.bias
        self.mod = Modulation(self.hidden, 6, bias=bias) if config.modulated else None
        self.attn = SelfAttention(config)
        first, last = (self.hidden, config.mlp_in_features), (config.mlp, self.hidden)
        self.mlp = nn.Sequential(Linear(*first, bias=bias), nn.Identity(), Linear(*last, bias=bias))

    def project_in_turn(self, normed: Activations, rope: Rope, joint: JointAttention, **stream: bool) -> None:
        """v, k, q one after the other, right for a long stream: each travels while the next is computed."""
        for which in IN_TURN:
            rows = slice(which.start * self.hidden, which.stop * self.hidden)
            joint.project(self.attn.qkv(normed, rows), self.attn.norm.scales[which], rope, which, **stream)

    def combine(self, x, attended, modulation: StreamModulation, ops: Segments) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, L, C) and its attended tokens -> (x, the MLP's output, still to be added)."""
        projected = self.attn.proj(ops.activations(attended))
        mlp = modulation.mlp
        x, normed = ops.add_norm(x, projected, modulation.attention.gate, mlp.shift, mlp.scale)
        return x, self.mlp[2](ops.mlp_in(self.mlp[0], normed, gated=self.gated))


class DoubleStreamBlock(nn.Module):
    def __init__(self, config: BlockConfig):
        super().__init__()
        self.txt = StreamBlock(config)
        self.img = StreamBlock(config)

    def forward(self, txt, img, txt_normed, img_normed, modulations, rope, joint: JointAttention, ops: Segments):
        """txt (B, Lt, C), img (B, Li, C); modulations, of StreamModulation, and rope a pair (text, image) each ->
        (txt, img, and what to add to each)."""
        with ops.beside.run(txt_normed):
            txt_qkv = self.txt.attn.qkv(txt_normed)
        self.img.project_in_turn(img_normed, rope[1], joint, text=False)
        ops.beside.join()
        joint.project(txt_qkv, self.txt.attn.norm.scales, rope[0], ALL, image=False)
        joint.attend(text_first=True)
        attended = joint.collect_text()
        with ops.beside.run(txt, attended):
            txt, txt_mlp = self.txt.combine(txt, attended, modulations[0], ops)
        img, img_mlp = self.img.combine(img, joint.collect_image(), modulations[1], ops)
        ops.beside.join()
        return txt, img, txt_mlp, img_mlp


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side (arXiv 2302.05442): linear1 holds qkv and the MLP's input, linear2 both
    outputs."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        hidden, self.hidden, self.gated = config.hidden, config.hidden, config.gated
        self.modulation = Modulation(hidden, 3, bias=config.bias) if config.modulated else None
        self.linear1 = Linear(hidden, 3 * hidden + config.mlp_in_features, bias=config.bias)
        self.linear2 = Linear(hidden + config.mlp, hidden, bias=config.bias)
        self.norm = QKNorm(hidden // config.heads)

    def forward(self, normed: Activations, rope: Rope, joint: JointAttention, ops: Segments) -> torch.Tensor:
        """normed (B, L, C) -> what to add to x (B, L, C)."""
        c = self.hidden
        for which in joint.parts:
            rows = slice(which.start * c, which.stop * c)
            joint.project(self.linear1(normed, rows), self.norm.scales[which], rope, which)
        mlp = ops.mlp_in(self.linear1, normed, slice(3 * c, None), gated=self.gated)  # while q, k, v travel
        joint.attend()
        out = self.linear2(mlp, columns=slice(c, None))  # while the attended tokens travel
        return self.linear2.add_to(out, ops.activations(joint.collect()), slice(0, c))


class FinalLayer(nn.Module):
    def __init__(self, hidden: int, out: int, *, bias: bool, modulated: bool):
        super().__init__()
        self.linear = Linear(hidden, out, bias=bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden, 2 * hidden, bias=bias)) if modulated else None
