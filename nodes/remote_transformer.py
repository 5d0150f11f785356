"""What stands in ComfyUI's model for its transformer, which lives in worker processes: evaluations go to the workers,
plain facts are answered as ComfyUI's own transformer answers them, and everything else says that it is not here.
"""

import contextlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import torch

from ..fastusp_backend.models.detection import Config
from ..fastusp_backend.pool import Prompt, Session
from ..fastusp_backend.weights.checkpoint import TensorInfo
from .comfyui import QwenImageTransformer2DModel, WrapperExecutor, WrappersMP, get_all_wrappers, model_management
from .host import Unsupported, following, progress
from .status import ends_told, node_status
from .weight_patches import PREFIX, weight_patches


class RemoteTransformer(torch.nn.Module):
    """Evaluates on the workers. It has no weights, but names those of the file. header: by ComfyUI's names. stock:
    ComfyUI's own transformer for the file, without weights, which gives its plain facts (sizes, `params`); what is left
    of it is its class. config: of the file's model.

    A subclass per family is called as ComfyUI calls the family's own transformer, also by the wrappers around it
    (WrappersMP.DIFFUSION_MODEL), which see its arguments by position.
    """

    def __init__(self, session: Session, header: dict[str, TensorInfo], stock: torch.nn.Module, config: Config):
        super().__init__()
        for name, value in vars(stock).items():
            if not name.startswith("_") and not isinstance(value, torch.nn.Module | torch.Tensor):
                setattr(self, name, value)
        self.stock = type(stock)
        self.session = session
        self._header = header
        self._config = config
        self._shapes = self._file_shapes()
        self._patches_uuid = None
        self._arrived: dict | None = None
        # The last of all: from here on these names are refused.
        self._fixed = frozenset({*dir(stock)} - {*dir(torch.nn.Module)} | {"__class__"})

    def __setattr__(self, name: str, value) -> None:
        """A node may leave notes here, and set `forward`, which counts while ComfyUI steps; setting what ComfyUI's own
        transformer has, but for that, would change nothing here."""
        if name in self.__dict__.get("_fixed", ()):
            raise Unsupported(f"A change inside the transformer ({name})")
        super().__setattr__(name, value)

    def __getattr__(self, name: str):
        if sys._getframe(1).f_globals.get("__name__") == "comfy.weight_adapter.bypass":
            # It takes an AttributeError for a layer that the LoRA does not fit, and goes on without it.
            raise Unsupported("A LoRA in bypass mode", "Load it with LoraLoaderModelOnly")
        raise AttributeError(
            f"a model of USP Loader has no {name!r}: its transformer is in the workers, not in ComfyUI's process. Load "
            "the model with Load Diffusion Model for a node that needs it"
        )

    def parameters(self, recurse: bool = True):
        """One without elements: nodes ask the first for its type and device."""
        yield torch.nn.Parameter(
            torch.empty(0, dtype=self.dtype, device=model_management.get_torch_device()), requires_grad=False
        )

    @contextlib.contextmanager
    def rehearsing(self) -> Iterator[dict]:
        """Evaluations give zeros meanwhile; yields the transformer options that reach them."""
        self._arrived = arrived = {}
        try:
            yield arrived
        finally:
            self._arrived = None

    @classmethod
    def fits(cls, unet_config: dict, config: Config) -> bool:
        """Whether what ComfyUI detected is the file's model."""
        return True

    def state_dict(self, *, destination=None, prefix="", keep_vars=False):
        """Tensors on the meta device, for nodes that look weights up."""
        destination = {} if destination is None else destination
        destination |= {prefix + name: tensor for name, tensor in meta_tensors(self._header).items()}
        return destination

    def _file_shapes(self) -> dict[str, tuple[int, ...]]:
        return {PREFIX + name: tuple(info.shape) for name, info in self._header.items()}

    def take_patches(self, uuid, patches: dict[str, list[tuple]]) -> None:
        """Evaluations from now on are by weights with a patcher's `patches`, which `uuid` identifies."""
        if uuid != self._patches_uuid:
            changes, self._shapes = weight_patches(patches, self._file_shapes())
            self.session = replace(self.session, patches=changes)
            self._patches_uuid = uuid

    def compute_in(self, dtype: torch.dtype) -> None:
        """Evaluations from now on are computed in `dtype`."""
        name = str(dtype).removeprefix("torch.")
        if name != self.session.model.compute:
            self.session = replace(self.session, model=msgspec.structs.replace(self.session.model, compute=name))

    def _through_wrappers(self, transformer_options: dict, *args, **kwargs) -> torch.Tensor:
        """`_evaluate`, a subclass's own, inside the wrappers that nodes put around the transformer."""
        if self._arrived is not None:
            self._arrived.update(transformer_options)
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        return WrapperExecutor.new_class_executor(self._evaluate, self, wrappers).execute(*args, **kwargs)

    def _on_workers(self, x, timestep, prompt: Prompt, control: dict | None, **blocks: int) -> torch.Tensor:
        """blocks: of a ControlNet's residuals under `input` and `output`, how many the model has a block for."""
        if self._arrived is not None:
            return torch.zeros_like(x)
        used = {kind: (control.get(kind) or [])[:count] for kind, count in blocks.items()} if control else None
        with ends_told(), following():
            output = self.session.evaluate(x, timestep, prompt, progress(), used)
        node_status().restore()
        return output.to(x.device)


class RemoteFlux(RemoteTransformer):
    """FLUX.1 and FLUX.2, of which ComfyUI has one transformer."""

    @classmethod
    def fits(cls, unet_config: dict, config: Config) -> bool:
        """Old ComfyUI takes every FLUX for one of hidden size 3072."""
        return unet_config["hidden_size"] == config.hidden

    @property
    def img_in(self) -> SimpleNamespace:
        """ComfyUI reads off its weight's shape whether the model, patched as it is now, takes an image or mask."""
        return SimpleNamespace(weight=torch.empty(self._shapes[f"{PREFIX}img_in.weight"], device="meta"))

    def forward(
        self,
        x,
        timestep,
        context,
        y=None,
        guidance=None,
        ref_latents=None,
        control=None,
        transformer_options={},  # noqa: B006 - ComfyUI's own signature
        **kwargs,
    ):
        args = x, timestep, context, y, guidance, ref_latents, control, transformer_options
        return self._through_wrappers(transformer_options, *args, **kwargs)

    def _evaluate(
        self,
        x,
        timestep,
        context,
        y,
        guidance,
        ref_latents,
        control,
        transformer_options,
        attention_mask=None,
        ref_latents_method=None,
        **kwargs,
    ):
        if attention_mask is not None and not masks_nothing(attention_mask):
            raise Unsupported(
                "A prompt with an attention mask (Apply Style Model with attn_bias)",
                "Set strength_type to multiply in Apply Style Model",
            )
        refuse_unsupported(transformer_options, kwargs)
        own = self._config.channels  # ComfyUI has put the image and mask of Fill, Canny, Depth behind them
        concat = x[:, own:] if x.shape[1] > own else None
        prompt = Prompt(context, y, guidance, concat, tuple(ref_latents or ()), ref_latents_method)
        counts = {"input": self._config.double_blocks, "output": self._config.single_blocks}
        return self._on_workers(x[:, :own], timestep, prompt, control, **counts)


class RemoteQwenImage(RemoteTransformer):
    _POSITIONS = inspect.signature(QwenImageTransformer2DModel.forward).parameters
    """The order of arguments differs between versions of ComfyUI; it calls by name, wrappers are called by position."""
    _ORDER = tuple(name for name, p in _POSITIONS.items() if name != "self" and p.kind is not p.VAR_KEYWORD)

    def process_img(self, *args, **kwargs):
        """What a ControlNet calls that computes with weights of the model itself."""
        raise Unsupported(
            "A ControlNet that needs the model's own weights (Qwen-Image Fun)",
            "Take an InstantX ControlNet, or load the model with Load Diffusion Model",
        )

    def forward(self, *args, **kwargs):
        given = dict(zip(self._ORDER, args, strict=False)) | kwargs
        positions = [given.pop(name, {} if name == "transformer_options" else None) for name in self._ORDER]
        return self._through_wrappers(positions[self._ORDER.index("transformer_options")], *positions, **given)

    def _evaluate(self, *args, **kwargs):
        return self._evaluate_named(**dict(zip(self._ORDER, args, strict=True)), **kwargs)

    def _evaluate_named(
        self,
        x,
        timestep,
        context,
        transformer_options,
        attention_mask=None,
        ref_latents=None,
        additional_t_cond=None,
        control=None,
        ref_latents_method=None,
        **kwargs,
    ):
        if attention_mask is not None and not masks_nothing(attention_mask):
            raise Unsupported("A prompt with an attention mask")
        if additional_t_cond is not None:
            raise Unsupported("The timestep condition of Qwen-Image-Layered (additional_t_cond)")
        refuse_unsupported(transformer_options, kwargs)
        prompt = Prompt(context, references=tuple(ref_latents or ()), reference_method=ref_latents_method)
        return self._on_workers(x, timestep, prompt, control, input=self._config.blocks)


TRANSFORMERS: dict[str, tuple[str, type[RemoteTransformer]]] = {
    "FLUX.1": ("flux", RemoteFlux),
    "FLUX.2": ("flux2", RemoteFlux),
    "Qwen-Image": ("qwen_image", RemoteQwenImage),
}
"""By family: the name that ComfyUI's detection gives it, and what stands for its transformer."""


def meta_tensors(header: dict[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """A file's tensors on the meta device."""
    return {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in header.items()}


def refuse_unsupported(transformer_options: dict, extra: dict) -> None:
    """Raises Unsupported, naming the node feature, for what would have to happen inside the transformer."""
    for kind in ("patches", "patches_replace"):
        names = [name for name, value in transformer_options.get(kind, {}).items() if value]
        if names:
            raise Unsupported(f"A patch inside the transformer ({kind}: {', '.join(names)})")
    for option, node, instead in (
        ("rope_options", "Scaled rotary positions (ScaleROPE)", ""),
        (
            "optimized_attention_override",
            "A replaced attention function",
            "Take that node out, and choose the attention in USP Optimization Settings",
        ),
    ):
        if transformer_options.get(option) is not None:
            raise Unsupported(node, instead)
    for name, value in extra.items():
        if value is not None:
            raise Unsupported(f"The conditioning's {name!r}")


def masks_nothing(mask: torch.Tensor) -> bool:
    """Whether a text's attention mask has no effect: ComfyUI adds floating-point ones to the attention's scores, as it
    does booleans; integers say which tokens count."""
    adds = mask.is_floating_point() or mask.dtype == torch.bool
    return not mask.any() if adds else bool((mask == 1).all())
