"""What the engine asks of a model family: a config read from a file's keys, and a transformer of these methods.
`detection.py` lists the families.

Shapes: B batch, C latent channels, h w latent size, T text tokens, S image tokens, L tokens of one rank.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from ..attention import JointAttention, Rope
from .checkpoint import Sizes
from .segments import Segments

HEAD_DIM = 128


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What a prompt gives the model: context (B, T, E), y (B, V) pooled text, guidance (B,) or (1,). Compared by
    identity: what is computed from it is kept as long as it lives."""

    context: torch.Tensor
    y: torch.Tensor | None = None
    guidance: torch.Tensor | None = None


class Config(Protocol):
    """Sizes read from a file.

    family: its name. runs: the models of the family that FastUSP runs, for refusals of others. marks: keys that tell
    its files from other families'. float16: whether its activations fit that type.
    """

    family: ClassVar[str]
    runs: ClassVar[str]
    marks: ClassVar[frozenset[str]]
    float16: ClassVar[bool]

    hidden: int
    heads: int

    @classmethod
    def from_sizes(cls, sizes: Sizes) -> "Config":
        """Raises CheckpointError for a file that is incomplete or of a variant that FastUSP does not run."""

    def build(self) -> "Transformer":
        """The transformer, with parameters as torch's default device and type have them."""


class Transformer(Protocol):
    """A torch module over this rank's tokens. `modulation_width`: values per evaluation and batch item."""

    config: Config
    modulation_width: int

    @staticmethod
    def module_key(key: str) -> str:
        """The name in this module of a file's tensor."""

    def check(self, x: torch.Tensor, conditioning: Conditioning) -> None:
        """Raises RequestError for latents or a prompt that do not fit the model."""

    def embed_text(self, context: torch.Tensor) -> torch.Tensor:
        """context (B, L, E) -> (B, L, hidden); done once per prompt."""

    def rope(self, text: int, grid: tuple[int, int], device: torch.device) -> tuple[Rope, Rope]:
        """Rotary tables (cos, sin) of all T text and all S image tokens."""

    def modulation_table(self, timesteps: torch.Tensor, conditioning: Conditioning, dtype: torch.dtype) -> torch.Tensor:
        """timesteps (n, B) -> (n, B, modulation_width): all adaLN outputs, computed in `dtype`, once per prompt."""

    def split_modulations(self, row: torch.Tensor) -> Any:
        """One evaluation's row (B, modulation_width), as views for `forward`."""

    def __call__(
        self,
        img: torch.Tensor,
        txt: torch.Tensor,
        mods: Any,
        rope: tuple[Rope, Rope],
        joint: JointAttention,
        run: Segments,
    ) -> torch.Tensor:
        """img (B, L, 4 C) patches and txt (B, L, hidden) of this rank -> velocity patches, as img."""


def check_prompt(x: torch.Tensor, conditioning: Conditioning, *, width: int) -> str | None:
    """What is wrong with a prompt for latents x (B, ...) and a model of text width `width`; None if nothing."""
    context, guidance, b = conditioning.context, conditioning.guidance, len(x)
    if context.dim() != 3 or context.shape[0] != b or context.shape[1] < 1 or context.shape[2] != width:
        return (
            f"the prompt's tensor {tuple(context.shape)} does not fit the model: expected ({b}, T, {width}). "
            "Was it made by the text encoders of another model?"
        )
    if guidance is not None and guidance.shape not in ((1,), (b,)):
        return f"the guidance {tuple(guidance.shape)} does not fit the latents: expected ({b},)"
    return None
