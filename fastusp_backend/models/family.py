"""What every model family is: a config read from a file's keys, and a transformer built from it.

Base classes, not protocols: they hold what most families have alike, and say no for what most lack (references,
ControlNets, pooled text, embedded guidance, further channels, weights that a LoRA reshapes). A family overrides what it
has. `detection.py` lists the families; outside this room nothing asks which one a model is of.

Shapes: B batch, C latent channels, h w latent size, T text tokens, S image tokens, Lt and Li those of one rank,
E width of the text.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from ..attention import JointAttention, Rope
from ..errors import RequestError
from ..prompt import Prompt
from ..weights.sizes import Sizes
from .layers import Linear
from .positions import References
from .prompts import check_prompt
from .residuals import NO_RESIDUALS, Residuals
from .segments import Segments
from .stream import Stream

HEAD_DIM = 128
Grid = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyConfig:
    """Sizes read from a file, and what all files of a family have in common.

    family: its name.
    runs: the models of the family that FastUSP runs, for refusals of others.
    marks: keys that tell its files from other families'.
    encoders: for people, what makes its text, of which width.
    text: tokens of a usual prompt, of which steps are predicted.
    sustained: the share of a card's rate that its products and attention had on one GPU.
    downscale: pixels of the image's edge per latent pixel.
    patch: latent pixels of a patch's edge.
    float16: whether its activations fit that type.
    timestep_scale: the timestep at sigma 1, as ComfyUI gives it.
    takes_guidance: whether ComfyUI gives its prompts a guidance other than 0 unless it is told.
    takes_control: whether ControlNets may add to its blocks.
    skips_blocks: whether blocks may be left out.
    blocks_differ: whether blocks of one kind differ in the tensors that they have.
    embeds_whole_text: whether its text's tokens see each other as they are embedded, so that every rank embeds all.
    multiple: of what each stream's tokens are a multiple: the model fills them up with learnt ones, which are attended
        as all others.
    qk_eps: epsilon of the norms of queries and keys.
    reference_methods: those of `positions.METHODS` that it knows, none where it takes no reference images; ComfyUI
        takes any other for `offset`.

    hidden: width of a token.
    heads: the number of attention heads.
    channels: the latents' channels.
    context: width of the text.
    pooled: width of the pooled text; 0 where there is none.
    concat_channels: channels of further input beside the latents.
    guidance: whether it is embedded; without, two prompts may be evaluated in a step.
    second_attentions: how many blocks, the first ones, have a second attention, of the image's tokens alone.
    image_blocks: how many blocks, the first ones, see the image's tokens alone.
    reference_method: how references are placed where the prompt says nothing.
    """

    family: ClassVar[str]
    runs: ClassVar[str]
    marks: ClassVar[frozenset[str]]
    encoders: ClassVar[str]
    text: ClassVar[int] = 512
    sustained: ClassVar[float] = 0.65
    downscale: ClassVar[int]
    patch: ClassVar[int]
    float16: ClassVar[bool] = False
    timestep_scale: ClassVar[float] = 1.0
    takes_guidance: ClassVar[bool] = False
    takes_control: ClassVar[bool] = False
    skips_blocks: ClassVar[bool] = False
    blocks_differ: ClassVar[bool] = False
    embeds_whole_text: ClassVar[bool] = False
    multiple: ClassVar[int] = 1
    qk_eps: ClassVar[float] = 1e-6
    reference_methods: ClassVar[frozenset[str]] = frozenset()

    hidden: int
    heads: int
    channels: int
    context: int
    pooled: int = 0
    concat_channels: int = 0
    guidance: bool = False
    second_attentions: int = 0
    image_blocks: int = 0
    reference_method: str = "offset"

    @classmethod
    def from_sizes(cls, sizes: Sizes) -> "FamilyConfig":
        """Raises CheckpointError for a file that is incomplete or of a variant that FastUSP does not run."""
        raise NotImplementedError

    @property
    def two_stream_blocks(self) -> int:
        """How many blocks, the first ones, have weights of their own for text and for the image."""
        raise NotImplementedError

    @classmethod
    def filled(cls, tokens: int) -> int:
        """How many tokens a stream of so many has with those that fill it up."""
        return -(-tokens // cls.multiple) * cls.multiple

    @property
    def image_alone(self) -> int:
        """Parameters of these blocks' products which the image's tokens have beyond those of the text."""
        return 0

    def build(self) -> "Transformer":
        """The transformer, with parameters as torch's default device and type have them."""
        raise NotImplementedError

    def reshaped(self, name: str, shape: tuple[int, ...]) -> "FamilyConfig | None":
        """The config of the model whose weight of this name was brought to `shape`, or has it already; None where that
        weight, of which a family has one at most, cannot be so."""
        return None

    def example_prompt(
        self, draw: Callable[..., torch.Tensor], *, text: int, size: Grid, batch: int = 1, guidance: float = 3.5
    ) -> Prompt:
        """A prompt as ComfyUI would give one for latents (B, C, *size), of `text` tokens and without references;
        draw(*shape) gives its values: of the text, then the pooled text, then further channels."""
        context = draw(batch, text, self.context)
        return Prompt(
            context,
            y=draw(batch, self.pooled) if self.pooled else None,
            guidance=torch.full((batch,), guidance, device=context.device) if self.takes_guidance else None,
            concat=draw(batch, self.concat_channels, *size) if self.concat_channels else None,
        )


class Stage(NamedTuple):
    """How far an evaluation has come. Of this rank's image tokens, each (B, Li, hidden):

    before: as they entered the first block.
    after: as they left the first block, or the last.
    velocity: patches (B, Li, p^2 C), at the end.
    """

    before: torch.Tensor | None
    after: torch.Tensor
    velocity: torch.Tensor | None = None


class Transformer(nn.Module):
    """A transformer over this rank's tokens. stream: brings weights that do not stay on the device."""

    def __init__(self, config: FamilyConfig):
        super().__init__()
        self.config = config
        self.stream: Stream | None = None

    def blocks(self) -> list[nn.Module]:
        """The blocks, in the order in which they are evaluated."""
        raise NotImplementedError

    def begin_block(self, number: int) -> None:
        """To be called by `stages` before it uses the weights of block `number` of `blocks`: of all, in order,
        those too that are left out."""
        if self.stream is not None:
            self.stream.begin(number)

    def tokens_arrived(self) -> None:
        """To be called when a block attends."""
        if self.stream is not None:
            self.stream.tokens_arrived()

    def tokens_returned(self) -> None:
        """To be called when a block's attended tokens are back."""
        if self.stream is not None:
            self.stream.tokens_returned()

    @staticmethod
    def module_key(key: str) -> str:
        """The name in this module of a file's tensor."""
        return key

    @staticmethod
    def file_key(name: str) -> str:
        """The inverse of `module_key`, in the original naming."""
        return name

    def products(self) -> Iterator[Linear]:
        """The large layers of every step, whose products may be computed in fp8."""
        raise NotImplementedError

    def check(self, x: torch.Tensor, prompt: Prompt) -> None:
        """Raises RequestError for latents or a prompt that do not fit the model."""
        self.check_latents(x)
        if problem := check_prompt(x, prompt, self.config):
            raise RequestError(problem)

    def check_latents(self, x: torch.Tensor) -> None:
        """Raises RequestError for latents other than (B, C, h, w)."""
        channels = self.config.channels
        if x.dim() != 4 or x.shape[1] != channels or not x.numel():
            raise RequestError(f"latents {tuple(x.shape)} do not fit the model: expected (B, {channels}, h, w)")

    def embed_text(self, context: torch.Tensor) -> torch.Tensor:
        """context (B, Lt, E) -> (B, Lt, hidden), or where the whole text is embedded (B, T, E) -> (B, `filled(T)`,
        hidden); computed once per prompt."""
        raise NotImplementedError

    def rope(self, text: int, grid: Grid, references: References, device: torch.device) -> tuple[Rope, Rope]:
        """Rotary tables (cos, sin) of all T text tokens, and of all S of the image and R of its references, with those
        that fill either up; or what else says where tokens lie: tables whose rows are tokens, as `stages` takes those
        of this rank."""
        raise NotImplementedError

    def modulations(self) -> list[nn.Module]:
        """The layers that give the adaLN outputs, with `out_features`: Linear, or networks. Joined in this order, those
        make a row of modulation_width values. A rank may have only some of these layers; the others' weights are on the
        meta device then."""
        raise NotImplementedError

    @property
    def modulation_width(self) -> int:
        """Values per evaluation and batch item."""
        return sum(layer.out_features for layer in self.modulations())

    def modulation_input(self, timesteps: torch.Tensor, prompt: Prompt, dtype: torch.dtype) -> torch.Tensor:
        """timesteps (n, B) -> (n, B, K) in `dtype`: what each of `modulations` is applied to."""
        raise NotImplementedError

    def split_modulations(self, rows: torch.Tensor) -> Any:
        """One evaluation's n rows (B, n, modulation_width) of modulations, as views for `stages`: the image stream's
        tokens take one of n rows each (`Segments.by_row`), all others the first."""
        raise NotImplementedError

    def stages(
        self,
        img: torch.Tensor,
        txt: torch.Tensor,
        mods: Any,
        rope: tuple[Rope, Rope],
        joint: JointAttention,
        ops: Segments,
        residuals: Residuals = NO_RESIDUALS,
    ) -> Iterator[Stage]:
        """img (B, Li, p^2 (C + C')) patches, zeros where the stream is filled up, and txt (B, Lt, hidden) of this rank,
        residuals for its image tokens -> twice a `Stage`: after the first block, and at the end. In between the caller
        may do other work, and may leave the second out."""
        raise NotImplementedError

    def finish(self, image: torch.Tensor, mods: Any, ops: Segments) -> torch.Tensor:
        """image (B, Li, hidden), as it comes out of the last block -> velocity patches (B, Li, p^2 C)."""
        raise NotImplementedError

    def forward(self, *args, **kwargs) -> torch.Tensor:
        """Takes what `stages` takes; gives velocity patches (B, Li, p^2 C)."""
        stages = self.stages(*args, **kwargs)
        next(stages)  # which is not kept
        return next(stages).velocity
