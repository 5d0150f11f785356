"""FLUX.2 (dev and klein; any size with head dim 128) in the original (BFL) key layout.

FLUX.1's streams with other blocks: SwiGLU for gelu, no biases, and one set of modulations for all double blocks and one
for all single ones, of timestep and guidance alone. A latent pixel is a token; the text's order has an axis of its own.

Shapes: B batch, n evaluations, C hidden.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..attention import Rope
from ..errors import CheckpointError
from ..prompt import Prompt
from ..weights.sizes import Sizes
from .family import HEAD_DIM, FamilyConfig
from .flux_blocks import BlockConfig, Modulation
from .flux_transformer import FluxTransformer, Modulations
from .layers import Linear, ModulationOut, StreamModulation, rope_tables
from .positions import References, image_positions

AXES = (32, 32, 32, 32)
"""Image, row, column, and place in the text."""
THETA = 2000.0
SPACING = 10
"""From one reference image to the next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flux2Config(FamilyConfig):
    """Sizes read from a file, and:

    mlp: width behind SwiGLU.
    double_blocks, single_blocks: how many there are.
    guidance: whether it is embedded (dev).
    """

    family: ClassVar[str] = "FLUX.2"
    runs: ClassVar[str] = "FLUX.2 dev and klein"
    marks: ClassVar[frozenset[str]] = frozenset(("img_in.weight", "double_stream_modulation_img.lin.weight"))
    downscale: ClassVar[int] = 16
    patch: ClassVar[int] = 1
    float16: ClassVar[bool] = True
    takes_guidance: ClassVar[bool] = True
    takes_control: ClassVar[bool] = True
    encoders: ClassVar[str] = (
        "that of CLIPLoader, type flux2 (dev: Mistral Small 3, width 15360; klein 4B: Qwen3 4B, 7680; klein 9B: Qwen3 "
        "8B, 12288)"
    )
    reference_methods: ClassVar[frozenset[str]] = frozenset(("offset", "index", "index_timestep_zero", "uxo"))

    mlp: int
    double_blocks: int
    single_blocks: int
    guidance: bool
    reference_method: str = "index"

    @property
    def two_stream_blocks(self) -> int:
        return self.double_blocks

    @classmethod
    def from_sizes(cls, sizes: Sizes) -> "Flux2Config":
        """Raises CheckpointError for a model that takes other than latents."""
        hidden, channels = sizes.matrix("img_in.weight")
        out_features = sizes.matrix("final_layer.linear.weight")[0]
        if channels != out_features:
            raise CheckpointError(
                f"{sizes.path} takes {channels} values per token and gives {out_features}: it is not one of {cls.runs}"
            )
        return cls(
            hidden=hidden,
            heads=sizes.heads(hidden, HEAD_DIM),
            channels=channels,
            context=sizes.matrix("txt_in.weight")[1],
            mlp=sizes.matrix("double_blocks.0.img_mlp.2.weight")[1],
            double_blocks=sizes.count("double_blocks"),
            single_blocks=sizes.count("single_blocks"),
            guidance=sizes.has("guidance_in"),
        )

    def build(self) -> "Flux2":
        return Flux2(self)


class Flux2(FluxTransformer):
    def __init__(self, config: Flux2Config):
        sizes = {"hidden": config.hidden, "heads": config.heads, "mlp": config.mlp}
        super().__init__(config, BlockConfig(**sizes, bias=False, gated=True, modulated=False))
        self.double_stream_modulation_txt = Modulation(config.hidden, 6, bias=False)
        self.double_stream_modulation_img = Modulation(config.hidden, 6, bias=False)
        self.single_stream_modulation = Modulation(config.hidden, 3, bias=False)

    def rope(self, text: int, grid: tuple[int, int], references: References, device: torch.device) -> tuple[Rope, Rope]:
        """Text tokens are at (0, 0, 0, place), the image's at (0, row, column, 0)."""
        image = F.pad(image_positions(grid, references, device, spacing=SPACING), (0, 1))
        words = F.pad(torch.arange(text, device=device)[:, None], (3, 0))
        return rope_tables(words, AXES, THETA), rope_tables(image, AXES, THETA)

    def modulations(self) -> list[Linear]:
        double = self.double_stream_modulation_txt.lin, self.double_stream_modulation_img.lin
        return [*double, self.single_stream_modulation.lin, self.final_layer.adaLN_modulation[1]]

    def modulation_input(self, timesteps: torch.Tensor, prompt: Prompt, dtype: torch.dtype) -> torch.Tensor:
        """timesteps (n, B) -> (n, B, C), computed in `dtype`. As in ComfyUI, y has no effect."""
        return F.silu(self.embed_timesteps(timesteps, prompt.guidance, dtype))

    def split_modulations(self, rows: torch.Tensor) -> Modulations:
        """One evaluation's rows (B, n, modulation_width) of modulations, as views; the text takes the first. All blocks
        of a kind share theirs."""
        parts = rows.split(self.config.hidden, dim=-1)
        text = StreamModulation.of([part[:, :1] for part in parts[:6]])
        double = text, StreamModulation.of(parts[6:12])
        single = ModulationOut(*parts[12:15])
        return Modulations([double] * len(self.double_blocks), [single] * len(self.single_blocks), parts[15:])
