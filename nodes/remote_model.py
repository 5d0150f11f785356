"""A standard MODEL whose transformer lives in worker processes.

ComfyUI's own detection builds the host's half (conditioning, latent format, noise schedule) from the file's header
alone; in place of the transformer stands a `RemoteTransformer`, which sends each evaluation to the workers. Samplers,
guiders and wrappers run on the host as ever.
"""

import functools
import inspect
import weakref
from dataclasses import replace
from types import SimpleNamespace

import torch

from ..fastusp_backend.errors import FastUSPError
from ..fastusp_backend.models.detection import Config, detect
from ..fastusp_backend.models.holding import rank_bytes
from ..fastusp_backend.pool import Prompt, Session
from ..fastusp_backend.weights.checkpoint import TensorInfo
from . import memory
from .comfyui import (
    ModelPatcher,
    QwenImageTransformer2DModel,
    WrapperExecutor,
    WrappersMP,
    get_all_wrappers,
    model_config_from_unet,
    model_management,
)
from .host import Unsupported, following, progress
from .remote_loop import sample_in_workers
from .status import node_status
from .weight_patches import MERGE, PREFIX, check_supported, weight_patches


class RemoteTransformer(torch.nn.Module):
    """Evaluates on the workers. It has no weights, but names those of the file. header: by ComfyUI's names. config: of
    the file's model.

    A subclass per family is called as ComfyUI calls the family's own transformer, also by the wrappers around it
    (WrappersMP.DIFFUSION_MODEL), which see its arguments by position.
    """

    def __init__(self, session: Session, header: dict[str, TensorInfo], dtype: torch.dtype, config: Config):
        super().__init__()
        self.session = session
        self.dtype = dtype
        self.patch_size = config.patch
        self._header = header
        self._config = config
        self._shapes = self._file_shapes()
        self._patches_uuid = None

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

    def _through_wrappers(self, transformer_options: dict, *args, **kwargs) -> torch.Tensor:
        """`_evaluate`, a subclass's own, inside the wrappers that nodes put around the transformer."""
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        return WrapperExecutor.new_class_executor(self._evaluate, self, wrappers).execute(*args, **kwargs)

    def _on_workers(self, x, timestep, prompt: Prompt, control: dict | None, **blocks: int) -> torch.Tensor:
        """blocks: of a ControlNet's residuals under `input` and `output`, how many the model has a block for."""
        used = {kind: (control.get(kind) or [])[:count] for kind, count in blocks.items()} if control else None
        with following():
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
        if attention_mask is not None:
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
        if attention_mask is not None:
            raise Unsupported("A prompt with an attention mask")
        if additional_t_cond is not None:
            raise Unsupported("The timestep condition of Qwen-Image-Layered (additional_t_cond)")
        refuse_unsupported(transformer_options, kwargs)
        prompt = Prompt(context, references=tuple(ref_latents or ()), reference_method=ref_latents_method)
        return self._on_workers(x, timestep, prompt, control, input=self._config.blocks)


_TRANSFORMERS: dict[str, tuple[str, type[RemoteTransformer]]] = {
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


_ALL = 1e32
"""As ComfyUI says that there is room for all weights."""


class RemotePatcher(ModelPatcher):
    """A ModelPatcher with nothing to move: the host holds no weights. Where a worker computes on the host's GPU, it has
    the size of the weights there (see memory.py).

    ComfyUI patches a model whenever it loads one, and loads a patcher before it samples with it. Here this tells the
    transformer, which all clones share, whose weight patches are meant; the workers get them with the next evaluation.
    """

    @property
    def session(self) -> Session:
        return self.model.fastusp_session

    def model_size(self):
        return (self.session.holds() or self.model.fastusp_nbytes) if self._shares_gpu() else 0

    def loaded_size(self):
        return self.session.holds() if self._shares_gpu() else 0

    def current_loaded_device(self):
        return self.load_device

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        memory.taking(self.session, self.load_device, self._first())
        super().partially_load(device_to, _ALL, force_patch_weights)
        return 0

    def partially_unload(self, device_to, memory_to_free=0, **_options):
        return memory.leaving(self.session)

    def detach(self, unpatch_all=True):
        model = super().detach(unpatch_all)
        if unpatch_all and self._shares_gpu():
            memory.leaving(self.session)
        return model

    def cleanup(self):
        """ComfyUI calls it when a sampling run has ended, well or not."""
        super().cleanup()
        memory.settling(self.session, self._first())

    def _first(self) -> "RemotePatcher":
        """The patcher that this one was cloned from, which lives as long as any of its clones."""
        first = self
        while first.parent is not None:
            first = first.parent
        return first

    def _shares_gpu(self) -> bool:
        device = getattr(self, "load_device", None)  # ComfyUI 0.3.64 asks for the size before there is one
        return device is not None and memory.shares_gpu(self.session, device)

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        known = {key: tuple(tensor.shape) for key, tensor in self.model.state_dict().items()}
        # A LoRA node passes what it has for text encoders, too.
        ours = {key: v for key, v in patches.items() if (key if isinstance(key, str) else key[0]) in known}
        check_supported(ours, known, self.model.fastusp_config)
        return super().add_patches(patches, strength_patch, strength_model)

    def add_object_patch(self, name, obj):
        if name.startswith("diffusion_model."):
            raise Unsupported(f"A change inside the transformer ({name})")
        return super().add_object_patch(name, obj)

    def patch_model(self, *args, **kwargs):
        transformer = self.model.diffusion_model
        if isinstance(transformer, RemoteTransformer):
            transformer.take_patches(self.patches_uuid, self.patches)
        return super().patch_model(*args, **kwargs)

    def add_hook_patches(self, hook, patches, strength_patch=1.0, strength_model=1.0):
        if patches:
            raise Unsupported(
                "A weight hook (Create Hook LoRA)",
                "Load the LoRA with LoraLoaderModelOnly, for the whole run, or the model with Load Diffusion Model",
            )

    def get_key_patches(self, filter_prefix=None):
        _no_weights()


def _no_weights(*_args, **_kwargs):
    raise Unsupported("Reading the weights (model merging, saving)", MERGE)


def remote_model(session: Session, header: dict[str, TensorInfo]) -> RemotePatcher:
    """The MODEL for `session`. header: of the file's tensors those that the model needs, from which ComfyUI detects its
    half of it.

    Raises FastUSPError where this ComfyUI does not know the file's family or sizes.
    """
    family = detect(header, session.model.path)
    name, transformer = _TRANSFORMERS[family.family]
    compute = getattr(torch, session.model.compute)
    meta = meta_tensors(header)
    config = model_config_from_unet(meta, "")
    detected = config.unet_config if config is not None else {}
    if detected.get("image_model") != name or not transformer.fits(detected, family):
        what = f"{family.family} of hidden size {family.hidden}"
        raise FastUSPError(f"{session.model.path}: this ComfyUI does not know {what}; update it")
    config.unet_config["disable_unet_model_creation"] = True
    config.set_inference_dtype(compute, None)
    model = config.get_model(meta, "")
    model.fastusp_config = family
    model.diffusion_model = transformer(session, config.process_unet_state_dict(dict(header)), compute, family)
    model.fastusp_session = session
    model.fastusp_nbytes = rank_bytes(header, session.spec, session.pool.devices.ranks)
    model.state_dict_for_saving = _no_weights  # would be a file of meta tensors
    device = model_management.get_torch_device()
    # Where no worker has ComfyUI's GPU, an evaluation takes none of its memory. By a weak reference: ComfyUI expects a
    # model to go when nobody refers to it any more, without a garbage collection.
    whole = functools.partial(type(model).memory_required, weakref.proxy(model))
    model.memory_required = lambda *args, **shapes: whole(*args, **shapes) if memory.shares_gpu(session, device) else 0
    patcher = RemotePatcher(
        model,
        load_device=device,
        offload_device=model_management.unet_offload_device(),
    )
    patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "fastusp", sample_in_workers)
    return patcher
