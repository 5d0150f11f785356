"""What FLUX.1, FLUX.2 and Chroma have alike: two streams, text and image, run 'double' blocks that attend jointly;
their joined sequence then runs 'single' blocks.

Everything around attention works token by token, so a rank runs it on its own tokens.

Shapes: B batch, L tokens of this rank (text first), C hidden, H heads, D head dim = 128, M mlp width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from ..attention import JointAttention, Rope
from .family import NO_RESIDUALS, FamilyConfig, Residuals, Stage, Transformer
from .flux_blocks import BlockConfig, DoubleStreamBlock, Embedder, FinalLayer, SingleStreamBlock
from .layers import Linear, ModulationOut, StreamModulation, timestep_embedding
from .segments import Segments


class Modulations(NamedTuple):
    """The modulations of one evaluation.

    double: per double block (text, image).
    single: per single block.
    final: (shift, scale) of the final layer's norm.
    """

    double: list[tuple[StreamModulation, StreamModulation]]
    single: list[ModulationOut]
    final: tuple[torch.Tensor, torch.Tensor]


class FluxTransformer(Transformer):
    """What is built from a config that also has the counts `double_blocks` and `single_blocks`.

    timed: whether it embeds timesteps, and guidance if the config has it, for layers of modulations.
    """

    def __init__(self, config: FamilyConfig, blocks: BlockConfig, *, timed: bool = True):
        super().__init__(config)
        hidden, bias = config.hidden, blocks.bias
        width, further = (channels * config.patch**2 for channels in (config.channels, config.concat_channels))
        self.img_in = Linear(width + further, hidden, bias=bias)
        self.txt_in = Linear(config.context, hidden, bias=bias)
        self.time_in = Embedder(256, hidden, bias=bias) if timed else None
        self.guidance_in = Embedder(256, hidden, bias=bias) if config.guidance else None
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(blocks) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(blocks) for _ in range(config.single_blocks))
        self.final_layer = FinalLayer(hidden, width, bias=bias, modulated=timed)

    def blocks(self) -> list[nn.Module]:
        return [*self.double_blocks, *self.single_blocks]

    @staticmethod
    def module_key(key: str) -> str:
        """The name in this module of a file's key: streams are submodules here, prefixes there; newer files say
        `weight`."""
        parts = key.split(".")
        if parts[0] == "double_blocks" and len(parts) > 2 and parts[2][:4] in ("img_", "txt_"):
            parts[2:3] = parts[2].split("_", 1)
        if parts[-2:-1] and parts[-2] in ("query_norm", "key_norm") and parts[-1] == "weight":
            parts[-1] = "scale"
        return ".".join(parts)

    @staticmethod
    def file_key(name: str) -> str:
        return name.replace(".txt.", ".txt_").replace(".img.", ".img_")

    def products(self) -> Iterator[Linear]:
        for block in self.double_blocks:
            for stream in (block.txt, block.img):
                yield from (stream.attn.qkv, stream.attn.proj, stream.mlp[0], stream.mlp[2])
        for block in self.single_blocks:
            yield from (block.linear1, block.linear2)

    def embed_text(self, context: torch.Tensor) -> torch.Tensor:
        return self.txt_in(context)

    def embed_timesteps(
        self, timesteps: torch.Tensor, guidance: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """timesteps (n, B), guidance (B,) or (1,) -> (n, B, C) in `dtype`. As in ComfyUI, a model with embedded
        guidance that is given none does without; and guidance, unlike timesteps, takes `dtype` before it is multiplied
        by 1000: bfloat16 makes 3504 of 3500."""
        vec = self.time_in(timestep_embedding(timesteps.flatten(), 256).to(dtype)).unflatten(0, timesteps.shape)
        if self.guidance_in is not None and guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance.to(dtype), 256).to(dtype))
        return vec

    def stages(
        self,
        img: torch.Tensor,
        txt: torch.Tensor,
        mods: Modulations,
        rope: tuple[Rope, Rope],
        joint: JointAttention,
        ops: Segments,
        residuals: Residuals = NO_RESIDUALS,
    ) -> Iterator[Stage]:
        """img (B, Li, p^2 (channels + concat_channels)) patches, txt (B, Lt, C) of `txt_in`, rope (text, image),
        residuals (B or 1, Li, C) -> velocity patches (B, Li, p^2 channels)."""
        before = img = self.img_in(img)
        first_txt, first_img = (stream.attention for stream in mods.double[0])
        txt_normed = ops.norm(txt, first_txt.shift, first_txt.scale)
        img_normed = ops.norm(img, first_img.shift, first_img.scale)
        following = [*mods.double[1:], None]
        for i, (block, streams, after) in enumerate(zip(self.double_blocks, mods.double, following, strict=True)):
            self.begin_block(i)
            txt, img, txt_mlp, img_mlp = block(txt, img, txt_normed, img_normed, streams, rope, joint, ops)
            if (residual := residuals.after_input(i)) is not None:
                img = img + residual
            txt_gate, img_gate = (stream.mlp.gate for stream in streams)
            if after is None:
                txt, img = ops.add(txt, txt_mlp, txt_gate), ops.add(img, img_mlp, img_gate)
            else:
                txt_next, img_next = (stream.attention for stream in after)
                txt, txt_normed = ops.add_norm(txt, txt_mlp, txt_gate, txt_next.shift, txt_next.scale)
                img, img_normed = ops.add_norm(img, img_mlp, img_gate, img_next.shift, img_next.scale)
            if i == 0:
                yield Stage(before, img)
                del before

        length = txt.shape[1]
        x = torch.cat([txt, img], dim=1)
        joint_rope = tuple(torch.cat([t, i]) for t, i in zip(*rope, strict=True))
        ends = [(own.shift, own.scale) for own in mods.single] + [mods.final]
        normed = ops.norm(x, *ends[0])
        for i, (block, own, (shift, scale)) in enumerate(zip(self.single_blocks, mods.single, ends[1:], strict=True)):
            self.begin_block(len(self.double_blocks) + i)
            if (residual := residuals.after_output(i)) is not None:
                x[:, length:] += residual
            after = ops if block is not self.single_blocks[-1] else ops.exact
            x, normed = after.add_norm(x, block(normed, joint_rope, joint, ops), own.gate, shift, scale)
        yield Stage(None, x[:, length:], self.final_layer.linear(normed[:, length:]))

    def finish(self, image: torch.Tensor, mods: Modulations, ops: Segments) -> torch.Tensor:
        return self.final_layer.linear(ops.exact.norm(image, *mods.final))
