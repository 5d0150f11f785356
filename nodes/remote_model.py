"""A standard MODEL whose transformer lives in worker processes.

ComfyUI's own detection builds the host's half (conditioning, latent format, noise schedule) from the file's header
alone; in place of the transformer stands a `RemoteTransformer`, which sends each evaluation to the workers. Samplers,
guiders and wrappers run on the host as ever.
"""

import functools
import weakref

import torch

from ..fastusp_backend.errors import FastUSPError
from ..fastusp_backend.models.detection import detect
from ..fastusp_backend.models.placement import place_file
from ..fastusp_backend.pool import Session
from ..fastusp_backend.weights.tensor_info import TensorInfo
from . import memory
from .comfyui import ModelPatcher, WrappersMP, model_config_from_unet, model_management
from .demo import preview_as_drawn
from .host import Unsupported
from .remote_families import TRANSFORMERS
from .remote_loop import sample_in_workers
from .remote_transformer import RemoteTransformer, meta_tensors
from .sampling_run import sampling_run
from .status import ends_told
from .weight_patches import MERGE, check_supported

_ALL = 1e32
"""ComfyUI's own number for room for all weights."""


class RemotePatcher(ModelPatcher):
    """A ModelPatcher with nothing to move: the host holds no weights. Where a worker computes on the host's GPU, it has
    the size of the weights there (see memory.py).

    ComfyUI patches a model whenever it loads one, and loads a patcher before it samples with it. Here this tells the
    transformer, which all clones share, whose weight patches are meant; the workers get them with the next evaluation.
    """

    @property
    def session(self) -> Session:
        transformer = self.model.diffusion_model
        return transformer.session if isinstance(transformer, RemoteTransformer) else self.model.fastusp_session

    def model_size(self):
        return (self.session.resident_bytes() or self.model.fastusp_nbytes) if self._shares_gpu() else 0

    def loaded_size(self):
        return self.session.resident_bytes() if self._shares_gpu() else 0

    def current_loaded_device(self):
        return self.load_device

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        memory.weights.make_room(self.session, self.load_device, self._first())
        super().partially_load(device_to, _ALL, force_patch_weights)
        return 0

    def partially_unload(self, device_to, memory_to_free=0, **_options):
        return memory.weights.evict(self.session)

    def detach(self, unpatch_all=True):
        model = super().detach(unpatch_all)
        if unpatch_all and self._shares_gpu():
            memory.weights.evict(self.session)
        return model

    def cleanup(self):
        """ComfyUI calls it when a sampling run has ended, well or not."""
        super().cleanup()
        memory.weights.after_run(self.session, self._first())

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
            raise Unsupported(f"a change inside the transformer ({name})")
        return super().add_object_patch(name, obj)

    def patch_model(self, *args, **kwargs):
        transformer = self.model.diffusion_model
        if isinstance(transformer, RemoteTransformer):
            transformer.take_patches(self.patches_uuid, self.patches)
        patched = super().patch_model(*args, **kwargs)
        if isinstance(transformer, RemoteTransformer):
            # Model Compute Dtype sets the first
            transformer.compute_in(self.model.manual_cast_dtype or self.model.get_dtype())
        return patched

    def add_weight_wrapper(self, name, function):
        raise Unsupported(f"a function around a weight ({name})")

    @ends_told()
    def add_hook_patches(self, hook, patches, strength_patch=1.0, strength_model=1.0):
        if patches:
            raise Unsupported(
                "a weight hook (Create Hook LoRA)",
                "Load the LoRA with LoraLoaderModelOnly, for the whole run, or the model with Load Diffusion Model",
            )

    def get_key_patches(self, filter_prefix=None):
        _no_weights()


def _no_weights(*_args, **_kwargs):
    raise Unsupported("reading the weights (model merging, saving)", MERGE)


def remote_model(session: Session, header: dict[str, TensorInfo]) -> RemotePatcher:
    """The MODEL for `session`. header: of the file's tensors those that the model needs, from which ComfyUI detects its
    half of it.

    Raises FastUSPError where this ComfyUI does not know the file's family or sizes.
    """
    family = detect(header, session.model.path)
    name, transformer = TRANSFORMERS[family.family]
    compute = getattr(torch, session.model.compute)
    meta = meta_tensors(header)
    config = model_config_from_unet(meta, "")
    detected = config.unet_config if config is not None else {}
    if detected.get("image_model") != name or not transformer.fits(detected, family):
        what = f"{family.family} of hidden size {family.hidden}"
        raise FastUSPError(f"Update ComfyUI: this one does not know {what}, as {session.model.path} is")
    config.set_inference_dtype(compute, None)
    model = config.get_model(meta, "", device=torch.device("meta"))  # with a transformer that has no memory
    model.device = None
    preview_as_drawn(model.latent_format, session.model.path)
    model.fastusp_config = family
    own_names = config.process_unet_state_dict(dict(header))
    model.diffusion_model = transformer(session, own_names, model.diffusion_model, family)
    model.fastusp_session = session
    model.fastusp_nbytes = place_file(header, session.spec, session.pool.devices.ranks).device_bytes
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
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "fastusp", functools.partial(sampling_run, session))
    patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "fastusp", sample_in_workers)
    return patcher
