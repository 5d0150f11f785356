"""Qwen-Image and Qwen-Image-Edit (arXiv 2508.02324; any size with head dim 128) in their files' own key names, which
are diffusers'.

Two streams, text and image, attend jointly in every block; see flux.py for why a block computes no modulations. After
the last attention nothing reads the text any more: its half of the last block is left out.

Shapes: B batch, L tokens of this rank (text first), C hidden, H heads, D head dim = 128, M mlp width.
"""

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
from .family import HEAD_DIM, NO_RESIDUALS, FamilyConfig, Residuals, Stage, Transformer
from .layers import Linear, RMSNorm, StreamModulation, rope_tables
from .positions import METHODS, References, image_positions
from .qwen_blocks import Block, TimestepEmbedder, combine
from .segments import Segments

AXES = (16, 56, 56)
THETA = 10_000.0
TIMESTEP_ZERO_MARK = "__index_timestep_zero__"
"""An empty tensor in files whose references are modulated as at timestep 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QwenImageConfig(FamilyConfig):
    """Sizes read from a file, and:

    mlp: width behind gelu.
    blocks: how many there are.
    reference_method: index, or index_timestep_zero, which Qwen-Image-Edit 2511 marks its files with.
    """

    family: ClassVar[str] = "Qwen-Image"
    runs: ClassVar[str] = "Qwen-Image and Qwen-Image-Edit"
    marks: ClassVar[frozenset[str]] = frozenset(("img_in.weight", "txt_norm.weight"))
    downscale: ClassVar[int] = 8
    patch: ClassVar[int] = 2
    takes_control: ClassVar[bool] = True
    encoders: ClassVar[str] = "that of CLIPLoader, type qwen_image (Qwen2.5-VL 7B, width 3584)"
    text: ClassVar[int] = 256  # as measured
    reference_methods: ClassVar[frozenset[str]] = frozenset(METHODS) - {"uxo"}

    mlp: int
    blocks: int
    reference_method: str = "index"

    @property
    def two_stream_blocks(self) -> int:
        return self.blocks

    @classmethod
    def from_sizes(cls, sizes: Sizes) -> "QwenImageConfig":
        """Raises CheckpointError for Mage-Flow, which has the same keys."""
        hidden, in_features = sizes.matrix("img_in.weight")
        out_features, context = sizes.matrix("proj_out.weight")[0], sizes.matrix("txt_in.weight")[1]
        if (out_features, context) == (128, 2560):
            raise CheckpointError(f"{sizes.path} holds Mage-Flow, which FastUSP does not run yet; it runs {cls.runs}")
        if in_features != out_features or in_features % cls.patch**2:
            raise CheckpointError(
                f"{sizes.path} takes {in_features} values per patch and gives {out_features}: it is not one of "
                f"{cls.runs}"
            )
        return cls(
            hidden=hidden,
            heads=sizes.heads(hidden, HEAD_DIM),
            channels=in_features // cls.patch**2,
            context=context,
            mlp=sizes.matrix("transformer_blocks.0.img_mlp.net.0.proj.weight")[0],
            blocks=sizes.count("transformer_blocks"),
            reference_method="index_timestep_zero" if sizes.has(TIMESTEP_ZERO_MARK) else "index",
        )

    def build(self) -> "QwenImage":
        return QwenImage(self)


class Modulations(NamedTuple):
    """The modulations of one evaluation.

    blocks: per block (text, image).
    final: (shift, scale) of the last norm.
    """

    blocks: list[tuple[StreamModulation, StreamModulation]]
    final: tuple[torch.Tensor, torch.Tensor]


class QwenImage(Transformer):
    """Parameters have their files' own names."""

    def __init__(self, config: QwenImageConfig):
        super().__init__(config)
        hidden, width = config.hidden, config.channels * config.patch**2
        self.img_in = Linear(width, hidden)
        self.txt_norm = RMSNorm(config.context)
        self.txt_in = Linear(config.context, hidden)
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(hidden)})
        self.transformer_blocks = nn.ModuleList(Block(hidden, config.heads, config.mlp) for _ in range(config.blocks))
        self.norm_out = nn.ModuleDict({"linear": Linear(hidden, 2 * hidden)})
        self.proj_out = Linear(hidden, width)
        if config.reference_method == "index_timestep_zero":
            self.register_parameter(TIMESTEP_ZERO_MARK, nn.Parameter(torch.empty(0), requires_grad=False))

    def blocks(self) -> list[nn.Module]:
        return list(self.transformer_blocks)

    def products(self) -> Iterator[Linear]:
        for block in self.transformer_blocks:
            for part in (block.attn, block.img_mlp, block.txt_mlp):
                yield from (layer for layer in part.modules() if isinstance(layer, Linear))

    def check(self, x: torch.Tensor, prompt: Prompt) -> None:
        super().check(x, prompt)
        if prompt.y is not None or prompt.guidance is not None:
            raise RequestError("Qwen-Image takes neither pooled text nor embedded guidance")

    def check_latents(self, x: torch.Tensor) -> None:
        """x (B, channels, h, w) or, with the frame axis of its VAE, (B, channels, 1, h, w)."""
        channels = self.config.channels
        if x.dim() == 5 and x.shape[2] > 1:
            raise RequestError(
                f"give one image per batch item, not latents {tuple(x.shape)} of {x.shape[2]} layers: "
                "Qwen-Image-Layered is not supported yet"
            )
        if x.dim() not in (4, 5) or x.shape[1] != channels or not x.numel():
            raise RequestError(f"latents {tuple(x.shape)} do not fit the model: expected (B, {channels}, [1,] h, w)")

    def embed_text(self, context: torch.Tensor) -> torch.Tensor:
        return self.txt_in(self.txt_norm(context))

    def rope(self, text: int, grid: tuple[int, int], references: References, device: torch.device) -> tuple[Rope, Rope]:
        """Image tokens are at (0, row, column) counted from the middle, n // 2 of n; text follows on all three axes
        from half the longer side. As ComfyUI counts: diffusers' middle of an odd n is one later."""
        image = image_positions(grid, references, device, centred=True)
        words = torch.arange(text, device=device) + max(grid) // 2
        return rope_tables(words[:, None].expand(-1, 3), AXES, THETA), rope_tables(image, AXES, THETA)

    def modulations(self) -> list[Linear]:
        layers = [mod for block in self.transformer_blocks for mod in (block.txt_mod[1], block.img_mod[1])]
        return [*layers, self.norm_out["linear"]]

    def modulation_input(self, timesteps: torch.Tensor, prompt: Prompt, dtype: torch.dtype) -> torch.Tensor:
        """timesteps (n, B) -> (n, B, C), computed in `dtype`."""
        embedded = self.time_text_embed["timestep_embedder"](timesteps.flatten(), dtype)
        return F.silu(embedded).unflatten(0, timesteps.shape)

    def split_modulations(self, rows: torch.Tensor) -> Modulations:
        """One evaluation's rows (B, n, modulation_width) of modulations, as views; the text takes the first."""
        parts = rows.split(self.config.hidden, dim=-1)
        blocks = []
        for first in range(0, 12 * self.config.blocks, 12):
            text, image = [part[:, :1] for part in parts[first : first + 6]], parts[first + 6 : first + 12]
            blocks.append((StreamModulation.of(text), StreamModulation.of(image)))
        *_, scale, shift = parts  # in this order, unlike the blocks'
        return Modulations(blocks, (shift, scale))

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
        """img (B, Li, 4 channels) patches, txt (B, Lt, C) of `embed_text`, rope (text, image), residuals
        (B or 1, Li, C) -> velocity patches, as img."""
        before = img = self.img_in(img)
        first_txt, first_img = (stream.attention for stream in mods.blocks[0])
        txt_normed = ops.norm(txt, first_txt.shift, first_txt.scale)
        img_normed = ops.norm(img, first_img.shift, first_img.scale)
        following = [*mods.blocks[1:], None]
        blocks = zip(self.transformer_blocks, mods.blocks, following, strict=True)
        for i, (block, (txt_own, img_own), after) in enumerate(blocks):
            self.begin_block(i)
            block.attn(txt_normed, img_normed, rope, joint, ops.beside)
            txt_end, img_end = (stream.attention[:2] for stream in after) if after else (None, mods.final)
            if txt_end:
                attended = joint.collect_text()
                with ops.beside.run(txt, attended):
                    projected = block.attn.to_add_out(ops.activations(attended))
                    txt, txt_normed = combine(txt, projected, txt_own, txt_end, block.txt_mlp, ops)
            projected, residual = block.attn.to_out[0](ops.activations(joint.collect_image())), residuals.after_input(i)
            img, img_normed = combine(
                img, projected, img_own, img_end, block.img_mlp, ops, residual, last=after is None
            )
            ops.beside.join()
            if i == 0:
                yield Stage(before, img)
                del before
        yield Stage(None, img, self.proj_out(img_normed))

    def finish(self, image: torch.Tensor, mods: Modulations, ops: Segments) -> torch.Tensor:
        return self.proj_out(ops.exact.norm(image, *mods.final))
