"""Chroma (Chroma1-HD, Base and Flash; any size with head dim 128) in the original key layout.

FLUX.1's streams without pooled text. In place of a modulation layer per block one small network gives all shifts,
scales and gates of an evaluation, each from timestep, guidance and its own number. It runs once per timestep of a run,
on the one rank that holds it (engine/modulations.py).

Shapes: B batch, n evaluations, C hidden, V vectors of modulations.
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..attention import Rope
from ..errors import CheckpointError
from ..prompt import Prompt
from ..weights.sizes import Sizes
from .family import HEAD_DIM, FamilyConfig
from .flux import AXES, THETA
from .flux_blocks import BlockConfig, Embedder
from .flux_transformer import FluxTransformer, Modulations
from .layers import Linear, ModulationOut, StreamModulation, rope_tables, timestep_embedding
from .positions import References, image_positions

NUMBERS = 344
"""Those of the vectors: 3 per single block, 6 per double block's image stream, then 6 per text stream, and behind any
gap the last two for the last norm. Chroma's own 38 and 19 blocks take all; ComfyUI counts so whatever the blocks."""
EMBEDDED = 16
"""Width of the embedded timestep, and of guidance; a number's is twice that."""
LAYERS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class ChromaConfig(FamilyConfig):
    """Sizes read from a file, and:

    mlp: width behind gelu.
    double_blocks, single_blocks: how many there are.
    approximator: width of the network that gives modulations.
    """

    family: ClassVar[str] = "Chroma"
    runs: ClassVar[str] = "Chroma1-HD, Base and Flash"
    marks: ClassVar[frozenset[str]] = frozenset(("img_in.weight", "distilled_guidance_layer.in_proj.weight"))
    downscale: ClassVar[int] = 8
    patch: ClassVar[int] = 2
    float16: ClassVar[bool] = True
    takes_control: ClassVar[bool] = True
    encoders: ClassVar[str] = "that of CLIPLoader, type chroma (T5-XXL, width 4096)"
    text: ClassVar[int] = 128  # about a hundred words: ComfyUI pads no more than is there

    mlp: int
    double_blocks: int
    single_blocks: int
    approximator: int

    @property
    def two_stream_blocks(self) -> int:
        return self.double_blocks

    @property
    def vectors(self) -> int:
        return 3 * self.single_blocks + 12 * self.double_blocks + 2

    @classmethod
    def from_sizes(cls, sizes: Sizes) -> "ChromaConfig":
        """Raises CheckpointError for a model that takes other than latents, or has more blocks than there are numbers
        for."""
        hidden, in_features = sizes.matrix("img_in.weight")
        out_features = sizes.matrix("final_layer.linear.weight")[0]
        if in_features != out_features or out_features % cls.patch**2:
            raise CheckpointError(
                f"{sizes.path} takes {in_features} values per patch and gives {out_features}: it is not one of "
                f"{cls.runs}"
            )
        config = cls(
            hidden=hidden,
            heads=sizes.heads(hidden, HEAD_DIM),
            channels=out_features // cls.patch**2,
            context=sizes.matrix("txt_in.weight")[1],
            mlp=sizes.matrix("double_blocks.0.img_mlp.0.weight")[0],
            double_blocks=sizes.count("double_blocks"),
            single_blocks=sizes.count("single_blocks"),
            approximator=sizes.matrix("distilled_guidance_layer.in_proj.weight")[0],
        )
        if config.vectors > NUMBERS:
            raise CheckpointError(
                f"{sizes.path} has {config.double_blocks} double and {config.single_blocks} single blocks, which take "
                f"{config.vectors} vectors of modulations: {cls.family} has {NUMBERS}"
            )
        return config

    def build(self) -> "Chroma":
        return Chroma(self)


class ApproximatorNorm(nn.Module):
    """An RMS norm with a learnt scale and torch's own epsilon, as ComfyUI has it."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale.to(x.dtype))


class Approximator(nn.Module):
    """Gives all V vectors of an evaluation."""

    def __init__(self, config: ChromaConfig):
        super().__init__()
        width, self.vectors = config.approximator, config.vectors
        self.in_proj = Linear(4 * EMBEDDED, width)
        self.layers = nn.ModuleList(Embedder(width, width, bias=True) for _ in range(LAYERS))
        self.norms = nn.ModuleList(ApproximatorNorm(width) for _ in range(LAYERS))
        self.out_proj = Linear(width, config.hidden)

    @property
    def out_features(self) -> int:
        return self.vectors * self.out_proj.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (n, 2 EMBEDDED) -> (n, V C). One evaluation after the other: within, each is V rows wide."""
        numbers = torch.arange(self.vectors, device=x.device)
        numbers[-2:] += NUMBERS - self.vectors
        embedded = timestep_embedding(numbers, 2 * EMBEDDED).to(x.dtype)
        rows = x.new_empty(len(x), self.out_features)
        for row, out in zip(x, rows, strict=True):
            out.copy_(self._vectors(torch.cat([row.expand(self.vectors, -1), embedded], -1)))
        return rows

    def _vectors(self, x: torch.Tensor) -> torch.Tensor:
        """x (V, 4 EMBEDDED) -> (V C)."""
        x = self.in_proj(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return self.out_proj(x).flatten()


class Chroma(FluxTransformer):
    def __init__(self, config: ChromaConfig):
        sizes = {"hidden": config.hidden, "heads": config.heads, "mlp": config.mlp}
        super().__init__(config, BlockConfig(**sizes, bias=True, gated=False, modulated=False), timed=False)
        self.distilled_guidance_layer = Approximator(config)

    @staticmethod
    def module_key(key: str) -> str:
        """Newer files say `weight` for the approximator's scales, too."""
        if key.startswith("distilled_guidance_layer.norms.") and key.endswith(".weight"):
            return key.removesuffix("weight") + "scale"
        return FluxTransformer.module_key(key)

    def rope(self, text: int, grid: tuple[int, int], references: References, device: torch.device) -> tuple[Rope, Rope]:
        """As FLUX.1's: text tokens are all at (0, 0, 0), the image's at (0, row, column)."""
        image = image_positions(grid, references, device)
        return rope_tables(image.new_zeros(text, 3), AXES, THETA), rope_tables(image, AXES, THETA)

    def modulations(self) -> list[nn.Module]:
        return [self.distilled_guidance_layer]

    def modulation_input(self, timesteps: torch.Tensor, prompt: Prompt, dtype: torch.dtype) -> torch.Tensor:
        """timesteps (n, B) -> (n, B, 2 EMBEDDED) in `dtype`. As in ComfyUI, guidance is 0 unless a node sets it, and
        takes `dtype` before it is multiplied by 1000; y has no effect."""
        guidance = timesteps.new_zeros(1) if prompt.guidance is None else prompt.guidance.to(dtype)
        embedded = [timestep_embedding(t, EMBEDDED).to(dtype) for t in (timesteps.flatten(), guidance)]
        shape = *timesteps.shape, EMBEDDED
        return torch.cat([embedded[0].view(shape), embedded[1].expand(shape)], dim=-1)

    def split_modulations(self, rows: torch.Tensor) -> Modulations:
        """One evaluation's row (B, 1, modulation_width) of modulations, as views."""
        parts = iter(rows.split(self.config.hidden, dim=-1))

        def take(count: int) -> tuple[torch.Tensor, ...]:
            return tuple(itertools.islice(parts, count))

        single = [ModulationOut(*take(3)) for _ in self.single_blocks]
        image, text = ([StreamModulation.of(take(6)) for _ in self.double_blocks] for _ in range(2))
        return Modulations(list(zip(text, image, strict=True)), single, take(2))
