"""What the engine asks of a model family: a config read from a file's keys, and a transformer of these methods.
`detection.py` lists the families.

Shapes: B batch, C latent channels, h w latent size, T text tokens, S image tokens, L tokens of one rank.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from ..attention import JointAttention, Rope
from ..prompt import Prompt
from ..weights.sizes import Sizes
from .layers import Linear
from .patchify import patch_grid
from .positions import METHODS, References
from .segments import Segments

HEAD_DIM = 128


class Residuals(NamedTuple):
    """What a ControlNet adds to the image stream: tensors (B or 1, n, hidden) for its first n tokens; `input` and
    `output` hold, block by block, the index of what is added after it, or None. Either may be shorter or longer than
    the model's blocks; `output` is for FLUX's single ones."""

    tensors: tuple[torch.Tensor, ...] = ()
    input: tuple[int | None, ...] = ()
    output: tuple[int | None, ...] = ()

    def after_input(self, block: int) -> torch.Tensor | None:
        return self._at(self.input, block)

    def after_output(self, block: int) -> torch.Tensor | None:
        return self._at(self.output, block)

    def _at(self, places: tuple[int | None, ...], block: int) -> torch.Tensor | None:
        place = places[block] if block < len(places) else None
        return None if place is None else self.tensors[place]

    def of_images(self, images: slice) -> "Residuals":
        """Those of some images of the batch."""
        return self._replace(tensors=tuple(t if len(t) == 1 else t[images] for t in self.tensors))


NO_RESIDUALS = Residuals()


class Config(Protocol):
    """Sizes read from a file.

    family: its name. runs: the models of the family that FastUSP runs, for refusals of others. marks: keys that tell
    its files from other families'. downscale: pixels of the image's edge per latent pixel. patch: latent pixels of a
    patch's edge. float16: whether its activations fit that type. reference_methods: those of
    `positions.METHODS` that it knows; ComfyUI takes any other for `offset`. encoders: for people, what makes its text,
    of which width. context: width of the text.
    channels, concat_channels: of the latents, and of further input. reference_method: what its files were trained with.
    """

    family: ClassVar[str]
    runs: ClassVar[str]
    marks: ClassVar[frozenset[str]]
    downscale: ClassVar[int]
    patch: ClassVar[int]
    float16: ClassVar[bool]
    reference_methods: ClassVar[frozenset[str]]
    encoders: ClassVar[str]

    hidden: int
    heads: int
    context: int
    channels: int
    concat_channels: int
    reference_method: str

    @classmethod
    def from_sizes(cls, sizes: Sizes) -> "Config":
        """Raises CheckpointError for a file that is incomplete or of a variant that FastUSP does not run."""

    def widened(self, name: str, shape: tuple[int, ...]) -> "Config | None":
        """The config of the model whose weight of this name was widened to `shape`, or has it already; None where that
        weight, of which a family has one at most, cannot be so."""

    def build(self) -> "Transformer":
        """The transformer, with parameters as torch's default device and type have them."""


class Transformer(Protocol):
    """A torch module over this rank's tokens. `modulation_width`: values per evaluation and batch item."""

    config: Config
    modulation_width: int

    @staticmethod
    def module_key(key: str) -> str:
        """The name in this module of a file's tensor."""

    @staticmethod
    def file_key(name: str) -> str:
        """The inverse of `module_key`, in the original naming."""

    def products(self) -> Iterator[Linear]:
        """The large layers of every step, whose products may be computed in fp8."""

    def check(self, x: torch.Tensor, prompt: Prompt) -> None:
        """Raises RequestError for latents or a prompt that do not fit the model."""

    def embed_text(self, context: torch.Tensor) -> torch.Tensor:
        """context (B, L, E) -> (B, L, hidden); done once per prompt."""

    def rope(self, text: int, grid: tuple[int, int], references: References, device: torch.device) -> tuple[Rope, Rope]:
        """Rotary tables (cos, sin) of all T text tokens, and of all S of the image and R of its references."""

    def modulations(self) -> list[Linear]:
        """The layers that give the adaLN outputs. Joined in this order, those make a row of modulation_width values.
        A rank may hold but some of these layers; the others' weights are on the meta device then."""

    def modulation_input(self, timesteps: torch.Tensor, prompt: Prompt, dtype: torch.dtype) -> torch.Tensor:
        """timesteps (n, B) -> (n, B, hidden) in `dtype`: what each of `modulations` is applied to."""

    def split_modulations(self, rows: torch.Tensor) -> Any:
        """One evaluation's n rows (B, n, modulation_width) of modulations, as views for `forward`: the image stream's
        tokens take one of n rows each (`Segments.by_row`), all others the first."""

    def __call__(
        self,
        img: torch.Tensor,
        txt: torch.Tensor,
        mods: Any,
        rope: tuple[Rope, Rope],
        joint: JointAttention,
        run: Segments,
        control: Residuals,
    ) -> torch.Tensor:
        """img (B, L, p^2 (C + C')) patches and txt (B, L, hidden) of this rank, control for the same tokens ->
        velocity patches (B, L, p^2 C)."""


def references_of(config: Config, prompt: Prompt) -> References:
    """How the model places a prompt's references."""
    if not prompt.references:
        return References(config.patch)
    method = prompt.reference_method or config.reference_method
    sizes = tuple(tuple(latent.shape[-2:]) for latent in prompt.references)
    return References(config.patch, sizes, method if method in config.reference_methods else "offset")


def check_prompt(x: torch.Tensor, prompt: Prompt, config: Config) -> str | None:
    """What is wrong with a prompt for latents x (B, ...) and a model; None if nothing."""
    context, guidance, b = prompt.context, prompt.guidance, len(x)
    if context.dim() != 3 or context.shape[0] != b or context.shape[1] < 1 or context.shape[2] != config.context:
        return (
            f"the prompt's tensor {tuple(context.shape)} does not fit the model: expected ({b}, T, {config.context}). "
            f"Was it made by the text encoders of another model? {config.family} takes {config.encoders}"
        )
    if guidance is not None and guidance.shape not in ((1,), (b,)):
        return f"the guidance {tuple(guidance.shape)} does not fit the latents: expected ({b},)"
    return _check_concat(x, prompt.concat, config) or _check_references(x, prompt, config)


def _check_concat(x: torch.Tensor, concat: torch.Tensor | None, config: Config) -> str | None:
    expected = (len(x), config.concat_channels, *x.shape[2:])
    given = None if concat is None else tuple(concat.shape)
    if given == (expected if config.concat_channels else None):
        return None
    if concat is None:
        return f"the model takes {config.concat_channels} channels of an image or mask beside the latents; got none"
    wanted = f"expected {expected}" if config.concat_channels else "it takes latents alone"
    return f"the image or mask channels {given} do not fit the model: {wanted}"


def _check_references(x: torch.Tensor, prompt: Prompt, config: Config) -> str | None:
    method = prompt.reference_method
    if method is not None and method not in METHODS:
        return f"the reference method {method!r} is not one of: {', '.join(METHODS)}"
    for latent in prompt.references:
        shape, frames = tuple(latent.shape), tuple(latent.shape[2:-2])
        if shape[:2] != (len(x), config.channels) or frames not in ((), (1,)) or not latent.numel():
            expected = f"({len(x)}, {config.channels}, [1,] h, w)"
            return f"a reference latent {shape} does not fit the model: expected {expected}"
    if prompt.references and config.concat_channels:
        return "a model of Fill, Canny or Depth kind takes no reference latents"
    return None


def check_control(x: torch.Tensor, prompt: Prompt, control: Residuals, config: Config) -> str | None:
    """What is wrong with a ControlNet's tensors for latents x (B, ..., h, w); None if nothing."""
    rows, columns = patch_grid(*x.shape[-2:], config.patch)
    most = rows * columns + references_of(config, prompt).tokens
    for tensor in control.tensors:
        fits = tensor.dim() == 3 and tensor.shape[0] in (1, len(x)) and tensor.shape[2] == config.hidden
        if not fits or not 0 < tensor.shape[1] <= most:
            return (
                f"a ControlNet's tensor {tuple(tensor.shape)} does not fit the model: expected ({len(x)}, up to "
                f"{most}, {config.hidden}). Was it made for another model?"
            )
    return None
