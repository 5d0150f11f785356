"""FLUX.1 (dev, schnell; any size with head dim 128) in the original (BFL) key layout.

Two towers, text and image, run 'double' blocks that attend jointly; their joined sequence then runs 'single' blocks.
Everything around attention works token by token, so a rank runs it on its own tokens; attention itself is the caller's.
Modulations depend on timestep, guidance and pooled text alone and are computed before the blocks.

Shapes: B batch, L tokens of this rank (text first), C hidden, H heads, D head dim = 128, M mlp width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .layers import HeadNorm, Linear, apply_rope, bounded, modulate, timestep_embedding

AXES = (16, 56, 56)
THETA = 10_000.0
PATCH = 2

Rope = tuple[torch.Tensor, torch.Tensor]
JointAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class FluxConfig:
    """Sizes read from a file. channels: latent channels; context, pooled: widths of the text inputs; guidance: dev."""

    hidden: int
    heads: int
    channels: int
    context: int
    pooled: int
    mlp: int
    double_blocks: int
    single_blocks: int
    guidance: bool


class Embedder(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.in_layer = Linear(width, hidden)
        self.out_layer = Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """silu(vec) -> `parts` tensors (B, 1, C): shift, scale, gate (and again, for a block's second half)."""

    def __init__(self, hidden: int, parts: int):
        super().__init__()
        self.parts = parts
        self.lin = Linear(hidden, parts * hidden)

    def forward(self, vec: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.parts, dim=-1)


class QKNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.query_norm = HeadNorm(dim)
        self.key_norm = HeadNorm(dim)

    def forward(self, qkv: torch.Tensor, heads: int, rope: Rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """qkv (B, L, 3 C) -> q, k, v (B, L, H, D): q and k normed and rotated."""
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
        return apply_rope(self.query_norm(q), *rope), apply_rope(self.key_norm(k), *rope), v


class SelfAttention(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.qkv = Linear(hidden, 3 * hidden)
        self.norm = QKNorm(hidden // heads)
        self.proj = Linear(hidden, hidden)


class Tower(nn.Module):
    """One stream's half of a double block. Its tensors are named img_* or txt_* in the file: see DoubleBlock."""

    def __init__(self, hidden: int, heads: int, mlp: int):
        super().__init__()
        self.heads = heads
        self.mod = Modulation(hidden, 6)
        self.attn = SelfAttention(hidden, heads)
        self.mlp = nn.Sequential(Linear(hidden, mlp), nn.GELU(approximate="tanh"), Linear(mlp, hidden))

    def project(self, x: torch.Tensor, mods: tuple[torch.Tensor, ...], rope: Rope):
        shift, scale = mods[:2]
        return self.attn.norm(self.attn.qkv(modulate(x, shift, scale)), self.heads, rope)

    def combine(self, x: torch.Tensor, attended: torch.Tensor, mods: tuple[torch.Tensor, ...]) -> torch.Tensor:
        _, _, gate, shift, scale, mlp_gate = mods
        x = x + gate * self.attn.proj(attended.flatten(2))
        return bounded(x + mlp_gate * self.mlp(modulate(x, shift, scale)))


class DoubleBlock(nn.Module):
    def __init__(self, config: FluxConfig):
        super().__init__()
        self.txt = Tower(config.hidden, config.heads, config.mlp)
        self.img = Tower(config.hidden, config.heads, config.mlp)

    def forward(self, txt, img, mods, rope: tuple[Rope, Rope], attention: JointAttention):
        """txt (B, Lt, C), img (B, Li, C), mods and rope a pair (text, image) each -> (txt, img)."""
        length = txt.shape[1]
        text, image = self.txt.project(txt, mods[0], rope[0]), self.img.project(img, mods[1], rope[1])
        attended = attention(*(torch.cat(pair, dim=1) for pair in zip(text, image, strict=True)))
        return (
            self.txt.combine(txt, attended[:, :length], mods[0]),
            self.img.combine(img, attended[:, length:], mods[1]),
        )


class SingleBlock(nn.Module):
    """Attention and MLP side by side (arXiv 2302.05442): linear1 holds qkv and the MLP's input, linear2 both
    outputs."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.heads = config.heads
        self.hidden = config.hidden
        self.modulation = Modulation(config.hidden, 3)
        self.linear1 = Linear(config.hidden, 3 * config.hidden + config.mlp)
        self.linear2 = Linear(config.hidden + config.mlp, config.hidden)
        self.norm = QKNorm(config.hidden // config.heads)

    def forward(self, x, mods, rope: Rope, attention: JointAttention):
        """x (B, L, C) -> (B, L, C)."""
        shift, scale, gate = mods
        qkv, mlp = self.linear1(modulate(x, shift, scale)).tensor_split([3 * self.hidden], dim=-1)
        attended = attention(*self.norm(qkv, self.heads, rope)).flatten(2)
        return bounded(x + gate * self.linear2(torch.cat([attended, F.gelu(mlp, approximate="tanh")], dim=-1)))


class FinalLayer(nn.Module):
    def __init__(self, hidden: int, out: int):
        super().__init__()
        self.linear = Linear(hidden, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden, 2 * hidden))

    def modulation(self, vec: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)

    def forward(self, x: torch.Tensor, mods: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.linear(modulate(x, *mods))


@dataclass(frozen=True, slots=True)
class Modulations:
    """All adaLN outputs of one evaluation: per double block (text, image), per single block, and the final layer's."""

    double: list[tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]]
    single: list[tuple[torch.Tensor, ...]]
    final: tuple[torch.Tensor, ...]


class Flux(nn.Module):
    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        width = config.channels * PATCH**2
        self.img_in = Linear(width, config.hidden)
        self.txt_in = Linear(config.context, config.hidden)
        self.time_in = Embedder(256, config.hidden)
        self.vector_in = Embedder(config.pooled, config.hidden)
        self.guidance_in = Embedder(256, config.hidden) if config.guidance else None
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_blocks))
        self.final_layer = FinalLayer(config.hidden, width)

    @staticmethod
    def module_key(key: str) -> str:
        """The name in this module of a file's key: towers are submodules here, prefixes there; newer files say
        `weight`."""
        parts = key.split(".")
        if parts[0] == "double_blocks" and len(parts) > 2 and parts[2][:4] in ("img_", "txt_"):
            parts[2:3] = parts[2].split("_", 1)
        if parts[-2:-1] and parts[-2] in ("query_norm", "key_norm") and parts[-1] == "weight":
            parts[-1] = "scale"
        return ".".join(parts)

    @staticmethod
    def file_key(name: str) -> str:
        """The inverse of `module_key`, in the original naming."""
        return name.replace(".txt.", ".txt_").replace(".img.", ".img_")

    def modulations(
        self, timestep: torch.Tensor, guidance: torch.Tensor | None, y: torch.Tensor | None, dtype: torch.dtype
    ) -> Modulations:
        """timestep (B,), guidance (B,) or (1,), y (B, pooled) -> the modulations, computed in `dtype`.

        As in ComfyUI, a dev model without guidance gets none and a missing y counts as zeros.
        """
        vec = self.time_in(timestep_embedding(timestep, 256).to(dtype))
        if self.guidance_in is not None and guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance, 256).to(dtype))
        if y is None:
            y = vec.new_zeros(timestep.shape[0], self.config.pooled)
        vec = vec + self.vector_in(y[:, : self.config.pooled].to(dtype))
        return Modulations(
            [(b.txt.mod(vec), b.img.mod(vec)) for b in self.double_blocks],
            [b.modulation(vec) for b in self.single_blocks],
            self.final_layer.modulation(vec),
        )

    def forward(
        self,
        img: torch.Tensor,
        txt: torch.Tensor,
        mods: Modulations,
        rope: tuple[Rope, Rope],
        attention: JointAttention,
    ) -> torch.Tensor:
        """img (B, Li, 4 channels) patches, txt (B, Lt, context), rope (text, image) -> velocity patches, as img."""
        img, txt = self.img_in(img), self.txt_in(txt)
        for block, block_mods in zip(self.double_blocks, mods.double, strict=True):
            txt, img = block(txt, img, block_mods, rope, attention)
        length = txt.shape[1]
        x = torch.cat([txt, img], dim=1)
        joint_rope = tuple(torch.cat([t, i]) for t, i in zip(*rope, strict=True))
        for block, block_mods in zip(self.single_blocks, mods.single, strict=True):
            x = block(x, block_mods, joint_rope, attention)
        return self.final_layer(x[:, length:], mods.final)
