"""USP Loader: a MODEL whose transformer lives in worker processes."""

import asyncio
import functools
import logging
import os
from typing import get_args

from ..fastusp_backend.config import EIGHT_BIT_ATTENTION, BatchParallel, FileState, ModelSpec, Settings, Storage
from ..fastusp_backend.devices import Devices, supports_bfloat16
from ..fastusp_backend.errors import CheckpointError, FastUSPError
from ..fastusp_backend.models.files import ModelFile, read_model
from ..fastusp_backend.planner import plan_batches
from ..fastusp_backend.pool import Session
from ..fastusp_backend.weights.dtypes import choose_types, main_dtype
from ..fastusp_backend.weights.tensor_info import TensorInfo
from .comfyui import advanced, command_line, io, search_aliases
from .fewer_gpus import faster_with_fewer
from .files import model_names, model_path
from .machines import warn_if_slower
from .pools import pool_for
from .remote_model import remote_model
from .servers import devices_of, served
from .settings import SettingsType
from .status import node_run, show

log = logging.getLogger(__name__)

STORAGE: dict[str, Storage | None] = {
    "default": None,
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}
_FLAGS: dict[str, Storage | None] = {
    "fp32_unet": "float32",
    "bf16_unet": "bfloat16",
    "fp16_unet": "float16",
    "fp8_e4m3fn_unet": "float8_e4m3fn",
    "fp8_e5m2_unet": "float8_e5m2",
    "fp64_unet": None,
    "fp8_e8m0fnu_unet": None,
    "force_fp32": "float32",
}
"""Arguments that ComfyUI was started with, in the order in which it heeds them, and what they mean for weights whose
type is the default; None for types that FastUSP does not have."""


class USPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FastUSPLoader",
            display_name="USP Loader",
            category="FastUSP",
            **search_aliases("multi gpu", "multigpu", "parallel", "gpus", "flux loader", "load diffusion model"),
            description="Loads a FLUX.1, FLUX.2, Chroma, Qwen-Image, Stable Diffusion 3 or Z-Image transformer onto "
            "several GPUs (or CPU ranks) that compute every step of one image together.",
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=model_names(),
                    tooltip="A FLUX.1 (dev, schnell, Kontext, Fill, Canny, Depth), FLUX.2 (dev, klein), Chroma1 (HD, "
                    "Base, Flash), Qwen-Image, Qwen-Image-Edit, Stable Diffusion 3 (3, 3.5 medium, 3.5 large) or "
                    "Z-Image (Turbo, Base) file in models/diffusion_models (safetensors or GGUF), or an all-in-one "
                    "checkpoint in models/checkpoints.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(STORAGE),
                    default="default",
                    tooltip="The type in which weights are stored. default: as in the file, or what ComfyUI was "
                    "started with (--bf16-unet and the like); fp8 and packed files are unpacked once where GPUs have "
                    "the room.",
                ),
                io.String.Input(
                    "gpus",
                    default="auto",
                    tooltip="auto: the largest set of identical GPUs, one CPU rank where there is no GPU. all: every "
                    "visible GPU. 0,1,3: these, in nvidia-smi's order; cuda:0,1: these, as torch counts. cpu:2: two "
                    "CPU ranks. host:port, or a name from fastusp.toml: those of a server.",
                ),
                advanced(
                    io.Int.Input(
                        "ulysses",
                        default=0,
                        min=0,
                        max=64,
                        tooltip="Ranks that share attention heads; must divide the head count. 0: chosen for you.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "ring",
                        default=0,
                        min=0,
                        max=64,
                        tooltip="Ranks that pass keys and values round. ulysses x ring is the number of ranks. 0: "
                        "chosen for you.",
                    )
                ),
                SettingsType.Input(
                    "settings", optional=True, tooltip="From USP Optimization Settings; without it the defaults apply."
                ),
                advanced(
                    io.Combo.Input(
                        "batch_parallel",
                        options=list(get_args(BatchParallel)),
                        default="auto",
                        optional=True,
                        tooltip="Let groups of ranks evaluate the positive and negative prompt (cfg above 1), or the "
                        "images of a batch, at the same time. auto: wherever the groups come out even. on: likewise, "
                        "ulysses and ring are those of a group, and an odd number of ranks is refused. off: never.",
                    )
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="A standard MODEL, for KSampler, USP Sampler and all others."
                )
            ],
        )

    @classmethod
    async def validate_inputs(cls, unet_name=None, gpus=None, ulysses=None, ring=None, batch_parallel="auto") -> bool:
        """Refuses impossible combinations before the prompt runs; an input that is linked is not known yet (None).
        ComfyUI leaves choices and ranges of the inputs that are named here to this check.

        Raises FastUSPError, which ComfyUI shows once, at this node; a text that is returned it would repeat for each of
        these inputs. In a thread: ComfyUI calls this on the event loop of its server, which answers nobody meanwhile,
        and files on network mounts, and drivers, may take their time.
        """
        return await asyncio.to_thread(cls._validate, unet_name, gpus, ulysses, ring, batch_parallel)

    @staticmethod
    def _validate(unet_name, gpus, ulysses, ring, batch_parallel) -> bool:
        devices = devices_of(gpus) if gpus is not None else None
        if unet_name is None:
            return True
        heads = _heads_of(unet_name, state_of(unet_name))
        if devices is not None and ulysses is not None and ring is not None:
            wish = "auto" if batch_parallel is None else batch_parallel
            more = {"batch_parallel": wish, "per_machine": devices.together}
            plan_batches(devices.ranks, heads, ulysses=ulysses, ring=ring, **more)
        return True

    @classmethod
    def fingerprint_inputs(cls, unet_name, gpus=None, **_others):
        """Runs again when the file was replaced or written to, or a server has other devices."""
        return f"{unet_name} {state_of(unet_name)} {served(gpus)}"

    @classmethod
    def execute(
        cls,
        unet_name,
        weight_dtype,
        gpus,
        ulysses,
        ring,
        settings: Settings | None = None,
        batch_parallel: BatchParallel = "auto",
    ) -> io.NodeOutput:
        with node_run("reading the file"):
            return cls._load(unet_name, weight_dtype, gpus, ulysses, ring, settings or Settings(), batch_parallel)

    @classmethod
    def _load(cls, unet_name, weight_dtype, gpus, ulysses, ring, settings: Settings, batch_parallel) -> io.NodeOutput:
        file = read_named(unet_name)
        devices = devices_of(gpus)
        session = Session(
            pool_for(devices),
            spec_on(devices, file, weight_dtype),
            plan_batches(
                devices.ranks,
                file.config.heads,
                ulysses=ulysses,
                ring=ring,
                batch_parallel=batch_parallel,
                per_machine=devices.together,
            ),
            settings,
        )
        model = remote_model(session, file.header)
        file.log_ignored()
        session.start()
        fewer = faster_with_fewer(session, file)
        hint = f"; {fewer} may be faster: see ComfyUI's log" if fewer is not None else ""
        if warn_if_slower(devices, session.layouts):
            hint += "; one machine may be faster at cfg 1: see ComfyUI's log"
        if devices.gpus and command_line.use_sage_attention and settings.attention not in EIGHT_BIT_ATTENTION:
            hint += f"; {_sage_is_not_followed()}"
        show(f"{file.config.family} on {devices}{hint}")
        return io.NodeOutput(model)


@functools.cache
def _sage_is_not_followed() -> str:
    """Says so in the log, once a process, and for the status."""
    text = "set attention to sage in USP Optimization Settings for what ComfyUI's --use-sage-attention does"
    log.warning("FastUSP: %s: it does not reach the workers", text)
    return text


def spec_on(devices: Devices, file: ModelFile, weight_dtype: str) -> ModelSpec:
    """How a file is loaded on `devices`. Raises as `_storage`."""
    types = choose_types(
        _storage(weight_dtype, file.header),
        main_dtype(file.header),
        cpu=devices.type == "cpu",
        bfloat16=supports_bfloat16(devices),
        float16=file.config.float16,
    )
    return file.spec(**types)


def _storage(weight_dtype: str, header: dict[str, TensorInfo]) -> Storage | None:
    """The type to store weights in; None for the file's. As in ComfyUI, its arguments leave alone what a file holds
    packed, or with scales. Raises FastUSPError for an argument that cannot be followed."""
    if weight_dtype != "default" or any(info.packing or info.scale is not None for info in header.values()):
        return STORAGE[weight_dtype]
    flag = next((flag for flag in _FLAGS if getattr(command_line, flag)), None)
    if flag is not None and _FLAGS[flag] is None:
        argument = f"--{flag.replace('_unet', '-unet')}"
        raise FastUSPError(
            f"Set weight_dtype in USP Loader: ComfyUI was started with {argument}, a type that FastUSP does not have"
        )
    return _FLAGS[flag] if flag is not None else None


def _path(unet_name: str) -> str:
    path = model_path(unet_name) if isinstance(unet_name, str) else None
    if path is None:
        raise CheckpointError(
            f"unet_name: choose another file, or put {unet_name!r} in models/diffusion_models (models/checkpoints for "
            "all-in-one files) and press R: it is not there"
        )
    return path


def state_of(unet_name: str) -> FileState:
    """Changes when the file is replaced or written to. Raises CheckpointError where it is gone."""
    try:
        return FileState.of(os.stat(_path(unet_name)))
    except OSError as error:
        raise CheckpointError(
            f"unet_name: choose another file: {unet_name!r} cannot be read: {error.strerror}"
        ) from error


@functools.lru_cache(maxsize=32)
def _heads_of(unet_name: str, state: FileState) -> int:
    """A model's attention heads, which are asked for with each prompt: to read its file again takes some 50 ms."""
    return read_named(unet_name).config.heads


def read_named(unet_name: str) -> ModelFile:
    """What the file of a value of `unet_name` says of its model. Raises CheckpointError, naming the input."""
    path = _path(unet_name)
    try:
        return read_model(path)
    except CheckpointError as error:
        # The page shows little room: the file once, by the name that the node has for it.
        raise CheckpointError(f"unet_name: {str(error).replace(path, repr(unet_name))}") from error
