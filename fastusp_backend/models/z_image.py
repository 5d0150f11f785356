"""Z-Image, Turbo and Base (arXiv 2511.22699; any size with head dim 128) in ComfyUI's key layout.

Text and image have refiners of their own, and then one stream, whose blocks follow each other. The text's refiners see
no timestep, so that they are run once a prompt, by every rank for the whole text. Both streams are filled up with a
learnt token each to a multiple of 32 tokens, which are attended as all others.

Shapes: B batch, n evaluations, L tokens of this rank (text first: Lt, then the image's Li), C hidden.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..attention import JointAttention, Rope
from ..errors import CheckpointError, RequestError
from ..kernels.sandwich import EPS
from ..prompt import Prompt
from ..weights.sizes import Sizes
from .family import HEAD_DIM, FamilyConfig, Stage, Transformer
from .layers import Linear, RMSNorm, rope_tables, timestep_embedding
from .positions import References, image_positions
from .residuals import NO_RESIDUALS, Residuals
from .segments import Segments
from .z_image_blocks import QK_EPS, Block, BlockModulation, ContextBlock

AXES = (32, 48, 48)
"""Place in the text, row and column."""
THETA = 256.0
_EMBEDDER = {"cap_embedder.0.": "cap_embedder.norm.", "cap_embedder.1.": "cap_embedder.linear."}
"""Beginnings of names in a file -> in the module."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ZImageConfig(FamilyConfig):
    """Sizes read from a file, and:

    mlp: width of a feed-forward.
    timestep, modulation: widths in the middle of the timestep's embedding, and of what modulations are made of.
    context_refiners: how many blocks are of the text alone.
    image_blocks: how many are of the image alone.
    blocks: how many are of both.
    """

    family: ClassVar[str] = "Z-Image"
    runs: ClassVar[str] = "Z-Image Turbo and Base"
    marks: ClassVar[frozenset[str]] = frozenset(("cap_pad_token", "noise_refiner.0.attention.qkv.weight"))
    downscale: ClassVar[int] = 8
    patch: ClassVar[int] = 2
    text: ClassVar[int] = 128  # about a hundred words, as Chroma's
    embeds_whole_text: ClassVar[bool] = True
    multiple: ClassVar[int] = 32
    qk_eps: ClassVar[float] = QK_EPS
    encoders: ClassVar[str] = "that of CLIPLoader, type lumina2 (Qwen3 4B, width 2560)"

    mlp: int
    timestep: int = 1024
    modulation: int = 256
    context_refiners: int = 2
    image_blocks: int = 2
    blocks: int

    @property
    def two_stream_blocks(self) -> int:
        return 0

    @classmethod
    def from_sizes(cls, sizes: Sizes) -> "ZImageConfig":
        """Raises CheckpointError for other patches than 2 x 2."""
        hidden, in_features = sizes.matrix("x_embedder.weight")
        out_features = sizes.matrix("final_layer.linear.weight")[0]
        if in_features != out_features or in_features % cls.patch**2:
            raise CheckpointError(
                f"{sizes.path} takes {in_features} values per patch and gives {out_features}: it is not one of "
                f"{cls.runs}"
            )
        return cls(
            hidden=hidden,
            heads=sizes.heads(hidden, HEAD_DIM),
            channels=in_features // cls.patch**2,
            context=sizes.matrix("cap_embedder.1.weight")[1],
            mlp=sizes.matrix("noise_refiner.0.feed_forward.w1.weight")[0],
            timestep=sizes.matrix("t_embedder.mlp.0.weight")[0],
            modulation=sizes.matrix("t_embedder.mlp.2.weight")[0],
            context_refiners=sizes.count("context_refiner"),
            image_blocks=sizes.count("noise_refiner"),
            blocks=sizes.count("layers"),
        )

    def build(self) -> "ZImage":
        return ZImage(self)


class Modulations(NamedTuple):
    """The modulations of one evaluation.

    blocks: of each block, those of the image alone first.
    final: the scale of the last norm, (B, 1, C).
    """

    blocks: list[BlockModulation]
    final: torch.Tensor


class SiluLinear(Linear):
    """Takes silu of its input, unlike the blocks' modulations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.silu(x))


class ZImage(Transformer):
    """Parameters have their files' own names but for `cap_embedder`'s, whose numbers are no blocks'."""

    def __init__(self, config: ZImageConfig):
        super().__init__(config)
        hidden, width = config.hidden, config.channels * config.patch**2
        sizes = hidden, config.heads, config.mlp
        self.x_embedder = Linear(width, hidden)
        self.x_pad_token = nn.Parameter(torch.empty(1, hidden), requires_grad=False)
        self.cap_embedder = nn.ModuleDict(
            {"norm": RMSNorm(config.context, EPS), "linear": Linear(config.context, hidden)}
        )
        self.cap_pad_token = nn.Parameter(torch.empty(1, hidden), requires_grad=False)
        first, last = Linear(256, config.timestep), Linear(config.timestep, config.modulation)
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(first, nn.SiLU(), last)})
        self.context_refiner = nn.ModuleList(ContextBlock(*sizes) for _ in range(config.context_refiners))
        self.noise_refiner = nn.ModuleList(Block(*sizes, config.modulation) for _ in range(config.image_blocks))
        self.layers = nn.ModuleList(Block(*sizes, config.modulation) for _ in range(config.blocks))
        modulation = nn.ModuleList([nn.SiLU(), SiluLinear(config.modulation, hidden)])
        self.final_layer = nn.ModuleDict({"linear": Linear(hidden, width), "adaLN_modulation": modulation})

    def blocks(self) -> list[nn.Module]:
        return [*self.noise_refiner, *self.layers]

    @staticmethod
    def module_key(key: str) -> str:
        for part, ours in _EMBEDDER.items():
            if key.startswith(part):
                return ours + key.removeprefix(part)
        return key

    @staticmethod
    def file_key(name: str) -> str:
        for part, ours in _EMBEDDER.items():
            name = name.replace(ours, part)
        return name

    def products(self) -> Iterator[Linear]:
        for block in self.blocks():
            for part in (block.attention, block.feed_forward):
                yield from (layer for layer in part.modules() if isinstance(layer, Linear))

    def check(self, x: torch.Tensor, prompt: Prompt) -> None:
        super().check(x, prompt)
        if prompt.y is not None or prompt.guidance is not None:
            raise RequestError(f"{self.config.family} takes neither pooled text nor embedded guidance")

    def embed_text(self, context: torch.Tensor) -> torch.Tensor:
        x = self.cap_embedder["linear"](self.cap_embedder["norm"](context))
        missing = self.config.filled(x.shape[1]) - x.shape[1]
        x = torch.cat([x, self.cap_pad_token.to(x.dtype).expand(len(x), missing, -1)], dim=1)
        rope = self._text_rope(x.shape[1], x.device)
        for block in self.context_refiner:
            x = block(x, rope)
        return x

    def _text_rope(self, text: int, device: torch.device) -> Rope:
        """The first text token is at (1, 0, 0), and each one behind the last."""
        return rope_tables(F.pad(torch.arange(1, text + 1, device=device)[:, None], (0, 2)), AXES, THETA)

    def rope(self, text: int, grid: tuple[int, int], references: References, device: torch.device) -> tuple[Rope, Rope]:
        """The image's tokens are at (behind the text, row, column), what fills them up is at (0, 0, 0). The third of
        the image's tables, (S, 1), says which ones do."""
        image = image_positions(grid, references, device)
        image[:, 0] = text + 1
        missing = self.config.filled(len(image)) - len(image)
        fills = torch.arange(len(image) + missing, device=device)[:, None] >= len(image)
        return self._text_rope(text, device), (*rope_tables(F.pad(image, (0, 0, 0, missing)), AXES, THETA), fills)

    def modulations(self) -> list[Linear]:
        return [block.adaLN_modulation[0] for block in self.blocks()] + [self.final_layer["adaLN_modulation"][1]]

    def modulation_input(self, timesteps: torch.Tensor, prompt: Prompt, dtype: torch.dtype) -> torch.Tensor:
        """timesteps (n, B), of which the model's own run from 0, noise, to 1 -> (n, B, modulation), computed in
        `dtype`."""
        embedded = self.t_embedder["mlp"](timestep_embedding(1.0 - timesteps.flatten(), 256).to(dtype))
        return embedded.unflatten(0, timesteps.shape)

    def split_modulations(self, rows: torch.Tensor) -> Modulations:
        """One evaluation's row (B, 1, modulation_width) of modulations, as views."""
        parts = rows.split(self.config.hidden, dim=-1)
        blocks = [BlockModulation(*parts[first : first + 4]) for first in range(0, len(parts) - 1, 4)]
        return Modulations(blocks, parts[-1])

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
        """img (B, Li, 4 channels) patches, txt (B, Lt, C) of `embed_text`, rope of `rope` -> velocity patches, as
        img."""
        *image_rope, fills = rope[1]
        channels, refiners = self.config.channels, len(self.noise_refiner)
        img = self.x_embedder(img.unflatten(-1, (channels, -1)).transpose(-1, -2).flatten(-2))
        img = torch.where(fills, self.x_pad_token.to(img.dtype), img)
        refined = self._run(img, 0, mods.blocks[:refiners], self.noise_refiner, image_rope, joint, ops, text=False)
        (img,) = deque(refined, maxlen=1)
        joint_rope = tuple(torch.cat(tables) for tables in zip(rope[0], image_rope, strict=True))
        x = torch.cat([txt, img], dim=1)
        layers = self._run(x, refiners, mods.blocks[refiners:], self.layers, joint_rope, joint, ops)
        count, x = img.shape[1], next(layers)
        yield Stage(img, x[:, -count:])
        del img
        (x,) = deque(itertools.chain([x], layers), maxlen=1)
        yield Stage(None, x, self.finish(x, mods, ops))

    def finish(self, image: torch.Tensor, mods: Modulations, ops: Segments) -> torch.Tensor:
        normed = F.layer_norm(image, image.shape[-1:], eps=1e-6) * (1 + mods.final)
        patches = -self.final_layer["linear"](normed)  # in row, column, channel order
        return patches.unflatten(-1, (-1, self.config.channels)).transpose(-1, -2).flatten(-2)

    def _run(
        self,
        x: torch.Tensor,
        first: int,
        mods: list[BlockModulation],
        blocks: nn.ModuleList,
        rope: Rope,
        joint: JointAttention,
        ops: Segments,
        **streams: bool,
    ) -> Iterator[torch.Tensor]:
        """x (B, L, C) through blocks, of all of which `first` is the first one's number -> x after each of them, of the
        last one the image's tokens alone."""
        ends = [(block.attention_norm1, own.attention_scale) for block, own in zip(blocks, mods, strict=True)] + [None]
        normed = ops.scaled_norm(x, *ends[0])
        for number, (block, own, end) in enumerate(zip(blocks, mods, ends[1:], strict=True)):
            self.begin_block(first + number)
            x, normed = block(x, normed, own, end, rope, joint, ops, **streams)
            yield x
