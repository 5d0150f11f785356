"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206; any size with head dim 64) in their original key layout.

Two streams, text and image, attend jointly in every block. Tokens are not rotated: those of the image begin with a
learnt position. After the last attention nothing reads the text any more, and the file has no weights for it. In the
first blocks of 3.5 medium the image's tokens attend to each other once more, side by side with the joint attention.

Shapes: B batch, n evaluations, Lt and Li a rank's tokens of text and image, C hidden.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..attention import JointAttention, Rope
from ..errors import CheckpointError, RequestError
from ..prompt import Prompt
from ..weights.sizes import Sizes
from .family import FamilyConfig, Stage, Transformer
from .layers import Linear, ModulationOut, StreamModulation, timestep_embedding
from .patchify import patch_grid
from .positions import References
from .residuals import NO_RESIDUALS, Residuals
from .sd3_blocks import BlockConfig, BlockModulation, Embedder, JointBlock, Norm, PatchEmbedder
from .segments import Segments

HEAD_DIM = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class SD3Config(FamilyConfig):
    """Sizes read from a file, and:

    mlp: width behind gelu.
    blocks: how many there are.
    normed: whether queries and keys are (3.5).
    positions: rows and columns of the square of learnt positions.
    """

    family: ClassVar[str] = "Stable Diffusion 3"
    runs: ClassVar[str] = "Stable Diffusion 3 and 3.5"
    marks: ClassVar[frozenset[str]] = frozenset(("x_embedder.proj.weight", "joint_blocks.0.x_block.attn.qkv.weight"))
    downscale: ClassVar[int] = 8
    patch: ClassVar[int] = 2
    float16: ClassVar[bool] = True
    timestep_scale: ClassVar[float] = 1000.0
    takes_control: ClassVar[bool] = True
    skips_blocks: ClassVar[bool] = True
    blocks_differ: ClassVar[bool] = True
    encoders: ClassVar[str] = "those of TripleCLIPLoader (CLIP-L, CLIP-G and T5-XXL, width 4096)"
    text: ClassVar[int] = 154  # 77 each of CLIP's and T5's, as ComfyUI pads them
    sustained: ClassVar[float] = 0.57  # heads of 64

    mlp: int
    blocks: int
    normed: bool = True
    positions: int

    @property
    def two_stream_blocks(self) -> int:
        return self.blocks

    @property
    def image_alone(self) -> int:
        """Second attentions, and in the last block all behind the attention."""
        return (4 * self.second_attentions + 1) * self.hidden**2 + 2 * self.hidden * self.mlp

    @classmethod
    def from_sizes(cls, sizes: Sizes) -> "SD3Config":
        """Raises CheckpointError for positions that are no square, and for other patches than 2 x 2."""
        out_features, hidden = sizes.matrix("final_layer.linear.weight")
        rows, blocks = sizes.table("pos_embed"), sizes.count("joint_blocks")
        positions = math.isqrt(rows)
        if positions**2 != rows:
            raise CheckpointError(f"{sizes.path} has {rows} learnt positions, no square: it is not one of {cls.runs}")
        if out_features % cls.patch**2:
            raise CheckpointError(f"{sizes.path} gives {out_features} values per patch: it is not one of {cls.runs}")
        second = (n + 1 for n in range(blocks) if sizes.has(f"joint_blocks.{n}.x_block.attn2"))
        return cls(
            hidden=hidden,
            heads=sizes.heads(hidden, HEAD_DIM),
            channels=out_features // cls.patch**2,
            context=sizes.matrix("context_embedder.weight")[1],
            pooled=sizes.matrix("y_embedder.mlp.0.weight")[1],
            mlp=sizes.matrix("joint_blocks.0.x_block.mlp.fc1.weight")[0],
            blocks=blocks,
            second_attentions=max(second, default=0),
            normed=any(sizes.has(f"joint_blocks.0.{part}.attn.ln_q") for part in ("x_block", "context_block")),
            positions=positions,
        )

    def build(self) -> "SD3":
        return SD3(self)


class Modulations(NamedTuple):
    """The modulations of one evaluation.

    blocks: of each block.
    final: (shift, scale) of the last norm.
    """

    blocks: list[BlockModulation]
    final: Norm


class SD3(Transformer):
    """Parameters have their files' own names."""

    def __init__(self, config: SD3Config):
        super().__init__(config)
        hidden = config.hidden
        self.x_embedder = PatchEmbedder(config.channels, config.patch, hidden)
        self.t_embedder = Embedder(256, hidden)
        self.y_embedder = Embedder(config.pooled, hidden)
        self.context_embedder = Linear(config.context, hidden)
        self.pos_embed = nn.Parameter(torch.empty(1, config.positions**2, hidden), requires_grad=False)
        self.joint_blocks = nn.ModuleList(
            JointBlock(
                BlockConfig(
                    hidden=hidden,
                    heads=config.heads,
                    mlp=config.mlp,
                    normed=config.normed,
                    second=number < config.second_attentions,
                    last=number == config.blocks - 1,
                )
            )
            for number in range(config.blocks)
        )
        self.final_layer = nn.ModuleDict(
            {
                "linear": Linear(hidden, config.channels * config.patch**2),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), Linear(hidden, 2 * hidden)),
            }
        )

    def blocks(self) -> list[nn.Module]:
        return list(self.joint_blocks)

    def products(self) -> Iterator[Linear]:
        for block in self.joint_blocks:
            for stream in (block.context_block, block.x_block):
                for part in (stream.attn, stream.attn2, stream.mlp):
                    if part is not None:
                        yield from (layer for layer in part.modules() if isinstance(layer, Linear))

    def check(self, x: torch.Tensor, prompt: Prompt) -> None:
        super().check(x, prompt)
        config, y = self.config, prompt.y
        most = config.positions
        if max(patch_grid(*x.shape[-2:], config.patch)) > most:
            edge = most * config.patch * config.downscale
            raise RequestError(
                f"choose a smaller size: latents {tuple(x.shape)} have more rows or columns than the model has "
                f"positions; its images are up to {edge} x {edge} pixels"
            )
        if prompt.guidance is not None:
            raise RequestError(f"{config.family} takes no embedded guidance")
        if y is not None and y.shape != (len(x), config.pooled):
            raise RequestError(
                f"choose the text encoders of {config.family}, {config.encoders}: the pooled text {tuple(y.shape)} "
                f"does not fit the model: expected ({len(x)}, {config.pooled})"
            )

    def embed_text(self, context: torch.Tensor) -> torch.Tensor:
        return self.context_embedder(context)

    def rope(self, text: int, grid: tuple[int, int], references: References, device: torch.device) -> tuple[Rope, Rope]:
        """Nothing for the text; for the image where the learnt position of each token lies, (S,), cut out of the middle
        of their square as ComfyUI does: behind (n - rows) // 2 of n rows, and likewise of columns."""
        side = self.config.positions
        rows, columns = (torch.arange(n, device=device) + (side - n) // 2 for n in grid)
        return (), ((rows[:, None] * side + columns).flatten(),)

    def modulations(self) -> list[Linear]:
        streams = [stream for block in self.joint_blocks for stream in (block.context_block, block.x_block)]
        return [part.adaLN_modulation[1] for part in streams] + [self.final_layer["adaLN_modulation"][1]]

    def modulation_input(self, timesteps: torch.Tensor, prompt: Prompt, dtype: torch.dtype) -> torch.Tensor:
        """timesteps (n, B), from 0 to 1000 -> (n, B, C), computed in `dtype`. As in ComfyUI, a model that is given no
        pooled text does without."""
        vec = self.t_embedder(timestep_embedding(timesteps.flatten(), 256, factor=1.0).to(dtype))
        vec = vec.unflatten(0, timesteps.shape)
        if prompt.y is not None:
            vec = vec + self.y_embedder(prompt.y.to(dtype))
        return F.silu(vec)

    def split_modulations(self, rows: torch.Tensor) -> Modulations:
        """One evaluation's row (B, 1, modulation_width) of modulations, as views."""
        parts = iter(rows.split(self.config.hidden, dim=-1))

        def take(count: int) -> tuple[torch.Tensor, ...]:
            return tuple(itertools.islice(parts, count))

        blocks = []
        for block in self.joint_blocks:
            text, image = take(block.context_block.parts), take(block.x_block.parts)
            blocks.append(
                BlockModulation(
                    text[:2],
                    StreamModulation.of(text) if len(text) == 6 else None,
                    StreamModulation.of(image[:6]),
                    ModulationOut(*image[6:]) if len(image) == 9 else None,
                )
            )
        return Modulations(blocks, take(2))

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
        """img (B, Li, 4 channels) patches, txt (B, Lt, C) of `embed_text`, rope of `rope`, residuals (B or 1, Li, C)
        -> velocity patches, as img."""
        (places,) = rope[1]
        img = self.x_embedder(img) + self.pos_embed[0, places].to(img.dtype)
        count = len(self.joint_blocks)
        kept = [number for number in range(count) if number not in residuals.skipped]
        first = kept[0] if kept else count
        if (residual := _added(residuals, range(first))) is not None:
            img = img + residual
        before = img
        # Of the norm ahead of each block, and of the last one.
        ends = [own.image.attention[:2] for own in mods.blocks] + [mods.final]
        img_normed = (ops if kept else ops.exact).norm(img, *ends[first])
        txt_normed = ops.norm(txt, *mods.blocks[first].text_norm) if kept else txt
        for number in range(count):
            self.begin_block(number)  # of one that is left out, too: the next one's weights come in its turn
            if number not in kept:
                continue
            following = next((later for later in kept if later > number), count)
            txt_end = mods.blocks[following].text_norm if following < count else None
            residual = _added(residuals, range(number, following))
            txt, img, txt_normed, img_normed = self.joint_blocks[number](
                txt, img, txt_normed, img_normed, mods.blocks[number], txt_end, ends[following], joint, ops, residual
            )
            if number == first:
                yield Stage(before, img)
                del before
        if not kept:
            yield Stage(before, img)
        yield Stage(None, img, self._velocity(img_normed))

    def finish(self, image: torch.Tensor, mods: Modulations, ops: Segments) -> torch.Tensor:
        return self._velocity(ops.exact.norm(image, *mods.final))

    def _velocity(self, normed: torch.Tensor) -> torch.Tensor:
        patches = self.final_layer["linear"](normed)  # in row, column, channel order
        return patches.unflatten(-1, (-1, self.config.channels)).transpose(-1, -2).flatten(-2)


def _added(residuals: Residuals, blocks: range) -> torch.Tensor | None:
    """The sum of what is added after some blocks, of which all but the first are left out; None for nothing."""
    found = [tensor for number in blocks if (tensor := residuals.after_output(number)) is not None]
    return sum(found[1:], found[0]) if found else None
