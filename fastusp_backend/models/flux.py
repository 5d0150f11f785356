"""FLUX.1 (dev, schnell, Kontext, Fill, Canny, Depth; any size with head dim 128) in the original (BFL) key layout.

Two towers, text and image, run 'double' blocks that attend jointly; their joined sequence then runs 'single' blocks.
Everything around attention works token by token, so a rank runs it on its own tokens.

Modulations depend on timestep, guidance and pooled text alone: one product per layer gives them for all evaluations,
and blocks are given what they need of them (engine/modulations.py).

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
from ..weights.checkpoint import Sizes
from .family import HEAD_DIM, NO_RESIDUALS, Conditioning, Residuals, check_prompt
from .flux_blocks import DoubleBlock, Embedder, FinalLayer, SingleBlock, SingleGates
from .layers import Gates, Linear, rope_tables, timestep_embedding
from .patchify import PATCH
from .positions import References, image_positions
from .segments import Segments

AXES = (16, 56, 56)
THETA = 10_000.0
MASK_CHANNELS = 64
"""A mask of 8 x 8 pixels per latent pixel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FluxConfig:
    """Sizes read from a file. channels: latent channels; concat_channels: of an image (Canny, Depth) or an image and a
    mask (Fill) beside them; context, pooled: widths of the text inputs; guidance: dev."""

    family: ClassVar[str] = "FLUX.1"
    runs: ClassVar[str] = "FLUX.1 dev, schnell, Kontext, Fill, Canny and Depth"
    marks: ClassVar[frozenset[str]] = frozenset(("img_in.weight", "double_blocks.0.img_attn.qkv.weight"))
    float16: ClassVar[bool] = True
    reference_methods: ClassVar[frozenset[str]] = frozenset(("offset", "index", "uxo"))
    reference_method: ClassVar[str] = "offset"

    hidden: int
    heads: int
    channels: int
    context: int
    pooled: int
    mlp: int
    double_blocks: int
    single_blocks: int
    guidance: bool
    concat_channels: int = 0

    @classmethod
    def from_sizes(cls, sizes: Sizes) -> "FluxConfig":
        """Raises CheckpointError for a model that takes what ComfyUI would not give it."""
        hidden, in_features = sizes.matrix("img_in.weight")
        out_features = sizes.matrix("final_layer.linear.weight")[0]
        channels, concat = out_features // PATCH**2, (in_features - out_features) // PATCH**2
        if in_features % PATCH**2 or out_features % PATCH**2 or concat not in (0, channels, channels + MASK_CHANNELS):
            raise CheckpointError(
                f"{sizes.path} takes {in_features} values per patch and gives {out_features}: it is none of {cls.runs}"
            )
        return cls(
            hidden=hidden,
            heads=sizes.heads(hidden, HEAD_DIM),
            channels=channels,
            concat_channels=concat,
            context=sizes.matrix("txt_in.weight")[1],
            pooled=sizes.matrix("vector_in.in_layer.weight")[1],
            mlp=sizes.matrix("double_blocks.0.img_mlp.0.weight")[0],
            double_blocks=sizes.count("double_blocks"),
            single_blocks=sizes.count("single_blocks"),
            guidance=sizes.has("guidance_in.in_layer.weight"),
        )

    def build(self) -> "Flux":
        return Flux(self)


class Modulations(NamedTuple):
    """The modulations of one evaluation: per double block (text, image), per single block, the final (shift, scale)."""

    double: list[tuple[Gates, Gates]]
    single: list[SingleGates]
    final: tuple[torch.Tensor, torch.Tensor]


class Flux(nn.Module):
    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        width = config.channels * PATCH**2
        self.img_in = Linear(width + config.concat_channels * PATCH**2, config.hidden)
        self.txt_in = Linear(config.context, config.hidden)
        self.time_in = Embedder(256, config.hidden)
        self.vector_in = Embedder(config.pooled, config.hidden)
        self.guidance_in = Embedder(256, config.hidden) if config.guidance else None
        sizes = config.hidden, config.heads, config.mlp
        self.double_blocks = nn.ModuleList(DoubleBlock(*sizes) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(*sizes) for _ in range(config.single_blocks))
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

    def products(self) -> Iterator[Linear]:
        """The large layers of every step, whose products may be computed in fp8."""
        for block in self.double_blocks:
            for tower in (block.txt, block.img):
                yield from (tower.attn.qkv, tower.attn.proj, tower.mlp[0], tower.mlp[2])
        for block in self.single_blocks:
            yield from (block.linear1, block.linear2)

    @property
    def modulation_width(self) -> int:
        """Values per evaluation and batch item."""
        config = self.config
        return (12 * config.double_blocks + 3 * config.single_blocks + 2) * config.hidden

    def check(self, x: torch.Tensor, conditioning: Conditioning) -> None:
        """Raises RequestError for latents or a prompt that do not fit the model."""
        config, y = self.config, conditioning.y
        if x.dim() != 4 or x.shape[1] != config.channels or not x.numel():
            raise RequestError(f"latents {tuple(x.shape)} do not fit the model: expected (B, {config.channels}, h, w)")
        if problem := check_prompt(x, conditioning, config):
            raise RequestError(problem)
        if conditioning.references and conditioning.reference_method == "index_timestep_zero":
            raise RequestError(
                "FLUX.1 knows no reference method index_timestep_zero; choose offset, index or uxo/uno in Edit Model "
                "Reference Method"
            )
        if y is not None and (y.dim() != 2 or len(y) != len(x) or y.shape[1] < config.pooled):
            raise RequestError(
                f"the pooled text {tuple(y.shape)} does not fit the model: expected ({len(x)}, {config.pooled})"
            )

    def embed_text(self, context: torch.Tensor) -> torch.Tensor:
        return self.txt_in(context)

    def rope(self, text: int, grid: tuple[int, int], references: References, device: torch.device) -> tuple[Rope, Rope]:
        """Text tokens are all at (0, 0, 0), the image's at (0, row, column)."""
        image = image_positions(grid, references, device, centred=False)
        return rope_tables(image.new_zeros(text, 3), AXES, THETA), rope_tables(image, AXES, THETA)

    def modulations(self) -> list[Linear]:
        """The layers of all modulations, in the order of `split_modulations`."""
        layers = [tower.mod.lin for block in self.double_blocks for tower in (block.txt, block.img)]
        layers += [block.modulation.lin for block in self.single_blocks]
        return [*layers, self.final_layer.adaLN_modulation[1]]

    def modulation_input(self, timesteps: torch.Tensor, conditioning: Conditioning, dtype: torch.dtype) -> torch.Tensor:
        """timesteps (n, B) -> (n, B, C), computed in `dtype`.

        As in ComfyUI, a dev model without guidance gets none and a missing y counts as zeros.
        """
        guidance, y = conditioning.guidance, conditioning.y
        n, batch = timesteps.shape
        vec = self.time_in(timestep_embedding(timesteps.flatten(), 256).to(dtype)).unflatten(0, (n, batch))
        if self.guidance_in is not None and guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance, 256).to(dtype))
        if y is None:
            y = vec.new_zeros(batch, self.config.pooled)
        return F.silu(vec + self.vector_in(y[:, : self.config.pooled].to(dtype)))

    def split_modulations(self, rows: torch.Tensor) -> Modulations:
        """One evaluation's row (B, 1, modulation_width) of modulations, as views."""
        parts = iter(rows.split(self.config.hidden, dim=-1))

        def take(kind: type, count: int):
            return kind(*(next(parts) for _ in range(count)))

        double = [(take(Gates, 6), take(Gates, 6)) for _ in self.double_blocks]
        single = [take(SingleGates, 3) for _ in self.single_blocks]
        return Modulations(double, single, (next(parts), next(parts)))

    def forward(
        self,
        img: torch.Tensor,
        txt: torch.Tensor,
        mods: Modulations,
        rope: tuple[Rope, Rope],
        joint: JointAttention,
        run: Segments,
        control: Residuals = NO_RESIDUALS,
    ) -> torch.Tensor:
        """img (B, Li, 4 (channels + concat_channels)) patches, txt (B, Lt, C) of `txt_in`, rope (text, image), control
        (B or 1, Li, C) -> velocity patches (B, Li, 4 channels)."""
        img = self.img_in(img)
        first_txt, first_img = mods.double[0]
        txt_normed = run.norm(txt, first_txt.shift, first_txt.scale)
        img_normed = run.norm(img, first_img.shift, first_img.scale)
        following = [*mods.double[1:], None]
        for i, (block, gates, after) in enumerate(zip(self.double_blocks, mods.double, following, strict=True)):
            txt, img, txt_mlp, img_mlp = block(txt, img, txt_normed, img_normed, gates, rope, joint, run)
            if (residual := control.after_input(i)) is not None:
                img = img + residual
            txt_gate, img_gate = gates[0].mlp_gate, gates[1].mlp_gate
            if after is None:
                txt, img = run.add(txt, txt_mlp, txt_gate), run.add(img, img_mlp, img_gate)
            else:
                txt, txt_normed = run.add_norm(txt, txt_mlp, txt_gate, after[0].shift, after[0].scale)
                img, img_normed = run.add_norm(img, img_mlp, img_gate, after[1].shift, after[1].scale)

        length = txt.shape[1]
        x = torch.cat([txt, img], dim=1)
        joint_rope = tuple(torch.cat([t, i]) for t, i in zip(*rope, strict=True))
        ends = [(gates.shift, gates.scale) for gates in mods.single] + [mods.final]
        normed = run.norm(x, *ends[0])
        for i, (block, gates, (shift, scale)) in enumerate(zip(self.single_blocks, mods.single, ends[1:], strict=True)):
            if (residual := control.after_output(i)) is not None:
                x[:, length:] += residual
            after = run if block is not self.single_blocks[-1] else run.exact
            x, normed = after.add_norm(x, block(normed, joint_rope, joint, run), gates.gate, shift, scale)
        return self.final_layer.linear(normed[:, length:])
