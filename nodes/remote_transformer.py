"""What stands in ComfyUI's model for its transformer, which lives in worker processes: evaluations go to the workers,
plain facts are answered as ComfyUI's own transformer answers them, and everything else says that it is not here.
"""

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import msgspec
import torch

from ..fastusp_backend.models.detection import FamilyConfig
from ..fastusp_backend.pool import Session
from ..fastusp_backend.prompt import Prompt
from ..fastusp_backend.weights.tensor_info import TensorInfo
from .comfyui import WrapperExecutor, WrappersMP, get_all_wrappers, model_management
from .host import Unsupported, interruptible, progress
from .provenance import owner
from .reachable import Unchanged, unchanged
from .status import ends_told, node_status
from .text_masks import masks_nothing
from .weight_patches import PREFIX, weight_patches

log = logging.getLogger(__name__)


def _refused(name: str) -> Unsupported:
    return Unsupported(f"a change inside the transformer ({name})")


class _Sealed(type):
    """Type of classes of which nobody may set more than `forward`: what would it change, and for whom?"""

    def __setattr__(cls, name: str, value) -> None:
        if name != "forward":
            raise _refused(name)
        super().__setattr__(name, value)


class RemoteTransformer(torch.nn.Module, metaclass=_Sealed):
    """Evaluates on the workers. It has no weights, but names those of the file.

    header: the file's tensors, by ComfyUI's names.
    stock: ComfyUI's own transformer for the file, without weights. Its plain facts (sizes, `params`) are copied, and of
        the rest only its class is used.
    config: the config of the file's model.

    A subclass per family is called as ComfyUI calls the family's own transformer, also by the wrappers around it
    (WrappersMP.DIFFUSION_MODEL), which see its arguments by position.
    """

    shown_as = "transformer"
    """What a status line calls it."""
    ignored: frozenset[str] = frozenset()
    """What ComfyUI gives its own transformer of the family with a prompt, and that one makes nothing of."""

    def __init__(self, session: Session, header: dict[str, TensorInfo], stock: torch.nn.Module, config: FamilyConfig):
        super().__init__()
        for name, value in vars(stock).items():
            if not name.startswith("_") and not isinstance(value, torch.nn.Module | torch.Tensor):
                setattr(self, name, value)
        self.stock = unchanged(type(stock))
        self.session = session
        self._header = header
        self._config = config
        self._shapes = self._file_shapes()
        self._patches_uuid = None
        self._arrived: dict | None = None
        self.unobstructed = False
        """Whether the last rehearsal of a run with this model has found nothing."""
        # The last of all: from here on these names are refused.
        self._fixed = frozenset({*dir(stock)} - {*dir(torch.nn.Module())} | {"__class__"})

    def __setattr__(self, name: str, value) -> None:
        """A node may leave notes here, which are no part of the module, and set `forward`, which counts while ComfyUI
        steps; setting what ComfyUI's own transformer has, but for that, would change nothing here."""
        if name in self.__dict__.get("_fixed", ()):
            raise _refused(name)
        object.__setattr__(self, name, value)

    def add_module(self, name: str, module: torch.nn.Module | None) -> None:
        if name in self._fixed:
            raise _refused(name)
        super().add_module(name, module)

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        if name in self._fixed:
            raise _refused(name)
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        if name in self._fixed:
            raise _refused(name)
        super().register_buffer(name, tensor, persistent)

    def __getattr__(self, name: str):
        for registered in ("_modules", "_parameters", "_buffers"):
            if name in self.__dict__.get(registered, {}):
                return self.__dict__[registered][name]
        if sys._getframe(1).f_globals.get("__name__") == "comfy.weight_adapter.bypass":
            # It takes an AttributeError for a layer that the LoRA does not fit, and goes on without it.
            raise Unsupported("a LoRA in bypass mode", "Load it with LoraLoaderModelOnly")
        raise AttributeError(
            f"load the model with Load Diffusion Model for a node that needs it: a model of USP Loader has no {name!r} "
            "in ComfyUI's process"
        )

    def __repr__(self) -> str:
        # unittest.mock, by which nodes replace functions for a while, goes on: does not have the attribute ...
        return "Load the model with Load Diffusion Model for this node: a model of USP Loader"

    def parameters(self, recurse: bool = True):
        """Yields one without elements: nodes ask the first for its type and device."""
        device = model_management.get_torch_device()
        yield torch.nn.Parameter(torch.empty(0, dtype=self.dtype, device=device), requires_grad=False)

    @contextlib.contextmanager
    def rehearsing(self) -> Iterator[dict]:
        """Evaluations give zeros meanwhile; yields the transformer options that reach them."""
        self._arrived = arrived = {}
        try:
            yield arrived
        finally:
            self._arrived = None

    @classmethod
    def fits(cls, unet_config: dict, config: FamilyConfig) -> bool:
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

    def _through_wrappers(self, transformer_options: dict, /, *args, **kwargs) -> torch.Tensor:
        """`_evaluate`, a subclass's own, inside the wrappers that nodes put around the transformer."""
        self._note_arrival(transformer_options)
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        return WrapperExecutor.new_class_executor(self._evaluate, self, wrappers).execute(*args, **kwargs)

    def _note_arrival(self, transformer_options: dict) -> None:
        """For a rehearsal."""
        if self._arrived is not None:
            self._arrived.update(transformer_options)

    def left_out(self, transformer_options: dict) -> list[int]:
        """The numbers of blocks that nodes leave out of an evaluation; a family that runs so overrides it."""
        return []

    def shown(self, mask: torch.Tensor, tokens: int) -> list[int] | None:
        """How many of a text's `tokens` a prompt's attention mask leaves, for each image, those behind them being as
        if they were not there; None for a mask that does anything else."""
        return [tokens] * len(mask) if masks_nothing(mask) else None

    @torch.compiler.disable  # Torch Compile Model has nothing to compile here
    def _on_workers(
        self, x, timestep, prompt: Prompt, control: dict | None, *, skipped: Sequence[int] = (), **blocks: int
    ) -> torch.Tensor:
        """skipped: the numbers of blocks that are left out. blocks: of a ControlNet's residuals under `input` and
        `output`, how many the model has a block for."""
        refuse_replaced(self.stock)
        if self._arrived is not None:
            return torch.zeros_like(x)
        used = {kind: (control.get(kind) or [])[:count] for kind, count in blocks.items()} if control else None
        with ends_told(), interruptible():
            output = self.session.evaluate(x, timestep, prompt, progress(), used, skipped)
        node_status().restore()
        return output.to(x.device)


def meta_tensors(header: dict[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """A file's tensors on the meta device."""
    return {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in header.items()}


def refuse_unsupported(transformer_options: dict, extra: dict, stock: Unchanged) -> None:
    """Raises Unsupported, naming the node feature, for what would have to happen inside the transformer. Patches of
    kinds that ComfyUI's own one does not read (attn2, for FLUX) have no effect there either."""
    for kind in ("patches", "patches_replace"):
        given = transformer_options.get(kind, {})
        names = [name for name, value in given.items() if value and stock.reader(name) is not None]
        if names:
            raise Unsupported(f"a patch inside the transformer ({kind}: {', '.join(names)})")
    for option, node, instead in (
        ("rope_options", "scaled rotary positions (ScaleROPE)", ""),
        (
            "optimized_attention_override",
            "a replaced attention function",
            "Remove that node, and choose the attention in USP Optimization Settings",
        ),
    ):
        if transformer_options.get(option) is not None:
            raise Unsupported(node, instead)
    for name, value in extra.items():
        if value is not None:
            raise Unsupported(f"the conditioning's {name!r}")


def refuse_replaced(stock: Unchanged) -> None:
    """Raises Unsupported where a pack has changed what ComfyUI's own transformer is made of, for all its models: that
    cannot reach the workers. Another attention function is told in the log alone: it is there for speed."""
    for place, name, value in stock.changes():
        whole, by = f"{place.module.__name__}.{name}", owner(value)
        if name.startswith(("optimized_attention", "attention_")):
            _tell_of_attention(whole, by)
        else:
            raise Unsupported(
                f"{by}'s change of {whole}",
                f"Disable {by} and restart ComfyUI, or load the model with Load Diffusion Model",
            )


@functools.cache
def _tell_of_attention(name: str, by: str) -> None:
    """Logs it once a process."""
    log.warning(
        "FastUSP: %s was replaced by %s; it has no effect on a model of USP Loader: attention is chosen in USP "
        "Optimization Settings",
        name,
        by,
    )
