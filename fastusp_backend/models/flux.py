"""FLUX.1 (dev, schnell, Kontext, Fill, Canny, Depth; any size with head dim 128) in the original (BFL) key layout.

Modulations depend on timestep, guidance and pooled text alone: one product per layer gives them for all evaluations,
and blocks are given what they need of them (engine/modulations.py).

Shapes: B batch, n evaluations, C hidden.
"""

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..attention import Rope
from ..errors import CheckpointError, RequestError
from ..prompt import Prompt
from ..weights.sizes import Sizes
from .family import HEAD_DIM, FamilyConfig
from .flux_blocks import BlockConfig, Embedder
from .flux_transformer import FluxTransformer, Modulations
from .layers import Linear, ModulationOut, StreamModulation, rope_tables
from .positions import References, image_positions

AXES = (16, 56, 56)
THETA = 10_000.0
MASK_CHANNELS = 64
"""A mask of 8 x 8 pixels per latent pixel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FluxConfig(FamilyConfig):
    """Sizes read from a file, and:

    concat_channels: those of an image (Canny, Depth), or of an image and a mask (Fill).
    mlp: width behind gelu.
    double_blocks, single_blocks: how many there are.
    guidance: whether it is embedded (dev).
    """

    family: ClassVar[str] = "FLUX.1"
    runs: ClassVar[str] = "FLUX.1 dev, schnell, Kontext, Fill, Canny and Depth"
    marks: ClassVar[frozenset[str]] = frozenset(("img_in.weight", "double_blocks.0.img_attn.qkv.weight"))
    downscale: ClassVar[int] = 8
    patch: ClassVar[int] = 2
    float16: ClassVar[bool] = True
    takes_guidance: ClassVar[bool] = True
    takes_control: ClassVar[bool] = True
    encoders: ClassVar[str] = "those of DualCLIPLoader, type flux (CLIP-L and T5-XXL, width 4096)"
    reference_methods: ClassVar[frozenset[str]] = frozenset(("offset", "index", "uxo"))

    mlp: int
    double_blocks: int
    single_blocks: int
    guidance: bool

    @property
    def two_stream_blocks(self) -> int:
        return self.double_blocks

    @classmethod
    def from_sizes(cls, sizes: Sizes) -> "FluxConfig":
        """Raises CheckpointError for a model that takes what ComfyUI would not give it."""
        hidden, in_features = sizes.matrix("img_in.weight")
        out_features = sizes.matrix("final_layer.linear.weight")[0]
        channels = out_features // cls.patch**2
        concat = cls._concat(in_features, channels)
        if out_features % cls.patch**2 or concat is None:
            raise CheckpointError(
                f"{sizes.path} takes {in_features} values per patch and gives {out_features}: it is not one of "
                f"{cls.runs}"
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
            guidance=sizes.has("guidance_in"),
        )

    def reshaped(self, name: str, shape: tuple[int, ...]) -> "FluxConfig | None":
        """The LoRAs of Canny and Depth widen the image's input."""
        if name != "img_in.weight" or len(shape) != 2 or shape[0] != self.hidden:
            return None
        concat = self._concat(shape[1], self.channels)
        return replace(self, concat_channels=concat) if concat is not None and concat >= self.concat_channels else None

    @classmethod
    def _concat(cls, in_features: int, channels: int) -> int | None:
        """concat_channels of a model that takes so many values per patch; None if it is not one of ours."""
        inputs, rest = divmod(in_features, cls.patch**2)
        concat = inputs - channels
        return concat if not rest and concat in (0, channels, channels + MASK_CHANNELS) else None

    def build(self) -> "Flux":
        return Flux(self)


class Flux(FluxTransformer):
    def __init__(self, config: FluxConfig):
        sizes = {"hidden": config.hidden, "heads": config.heads, "mlp": config.mlp}
        super().__init__(config, BlockConfig(**sizes, bias=True, gated=False, modulated=True))
        self.vector_in = Embedder(config.pooled, config.hidden, bias=True)

    def check(self, x: torch.Tensor, prompt: Prompt) -> None:
        """Raises RequestError for latents or a prompt that do not fit the model."""
        super().check(x, prompt)
        y, pooled = prompt.y, self.config.pooled
        if prompt.references and prompt.reference_method == "index_timestep_zero":
            raise RequestError(
                "choose offset, index or uxo/uno in Edit Model Reference Method: FLUX.1 knows no reference method "
                "index_timestep_zero"
            )
        if y is not None and (y.dim() != 2 or len(y) != len(x) or y.shape[1] < pooled):
            raise RequestError(
                f"the pooled text {tuple(y.shape)} does not fit the model: expected ({len(x)}, {pooled})"
            )

    def rope(self, text: int, grid: tuple[int, int], references: References, device: torch.device) -> tuple[Rope, Rope]:
        """Text tokens are all at (0, 0, 0), the image's at (0, row, column)."""
        image = image_positions(grid, references, device)
        return rope_tables(image.new_zeros(text, 3), AXES, THETA), rope_tables(image, AXES, THETA)

    def modulations(self) -> list[Linear]:
        layers = [stream.mod.lin for block in self.double_blocks for stream in (block.txt, block.img)]
        layers += [block.modulation.lin for block in self.single_blocks]
        return [*layers, self.final_layer.adaLN_modulation[1]]

    def modulation_input(self, timesteps: torch.Tensor, prompt: Prompt, dtype: torch.dtype) -> torch.Tensor:
        """timesteps (n, B) -> (n, B, C), computed in `dtype`. As in ComfyUI, a missing y counts as zeros."""
        vec, y = self.embed_timesteps(timesteps, prompt.guidance, dtype), prompt.y
        if y is None:
            y = vec.new_zeros(timesteps.shape[1], self.config.pooled)
        return F.silu(vec + self.vector_in(y[:, : self.config.pooled].to(dtype)))

    def split_modulations(self, rows: torch.Tensor) -> Modulations:
        """One evaluation's row (B, 1, modulation_width) of modulations, as views."""
        parts = iter(rows.split(self.config.hidden, dim=-1))

        def take(count: int) -> tuple[torch.Tensor, ...]:
            return tuple(itertools.islice(parts, count))

        double = [(StreamModulation.of(take(6)), StreamModulation.of(take(6))) for _ in self.double_blocks]
        single = [ModulationOut(*take(3)) for _ in self.single_blocks]
        return Modulations(double, single, take(2))
