"""Everything of ComfyUI that the nodes use, checked once, when ComfyUI loads the pack: what is missing in a ComfyUI of
another version is named in its start-up log, not met in the middle of a prompt.

The other files of this folder import ComfyUI from here alone.
"""

import functools
import importlib
import inspect

import torch

TESTED = "0.3.64 to 0.33.0"
TORCH = 2, 7
"""The oldest torch: it brought the last of the types that model files name."""

USED = {
    "comfy.cli_args": [
        "args.bf16_unet",
        "args.force_fp32",
        "args.fp16_unet",
        "args.fp32_unet",
        "args.fp64_unet",
        "args.fp8_e4m3fn_unet",
        "args.fp8_e5m2_unet",
        "args.fp8_e8m0fnu_unet",
        "args.use_sage_attention",
    ],
    "comfy.conds": ["CONDRegular.process_cond(batch_size, area)"],
    "comfy.k_diffusion.sampling": [
        "default_noise_sampler(x, seed)",
        "sample_dpm_2(model, x, sigmas, extra_args, callback, disable)",
        "sample_dpmpp_2m(model, x, sigmas, extra_args, callback, disable)",
        "sample_euler(model, x, sigmas, extra_args, callback, disable)",
        "sample_euler_ancestral(model, x, sigmas, extra_args, callback, disable)",
        "sample_heun(model, x, sigmas, extra_args, callback, disable)",
        "sample_lcm(model, x, sigmas, extra_args, callback, disable)",
        "sample_res_multistep(model, x, sigmas, extra_args, callback, disable)",
    ],
    "comfy.ldm.qwen_image.model": ["QwenImageTransformer2DModel.forward(x, timestep, context, transformer_options)"],
    "comfy.model_base": [
        "BaseModel.get_dtype()",
        "BaseModel.memory_required(input_shape, cond_shapes)",
    ],
    "comfy.model_detection": ["model_config_from_unet(state_dict, unet_key_prefix)"],
    "comfy.model_management": [
        "InterruptProcessingException",
        "get_torch_device()",
        "load_models_gpu(models)",
        "processing_interrupted()",
        "soft_empty_cache()",
        "throw_exception_if_processing_interrupted()",
        "unet_offload_device()",
        "unload_all_models()",
    ],
    "comfy.model_patcher": [
        "ModelPatcher(model, load_device, offload_device)",
        "ModelPatcher.add_hook_patches(hook, patches, strength_patch, strength_model)",
        "ModelPatcher.add_object_patch(name, obj)",
        "ModelPatcher.add_patches(patches, strength_patch, strength_model)",
        "ModelPatcher.add_wrapper_with_key(wrapper_type, key, wrapper)",
        "ModelPatcher.cleanup()",
        "ModelPatcher.clone()",
        "ModelPatcher.current_loaded_device()",
        "ModelPatcher.detach(unpatch_all)",
        "ModelPatcher.get_key_patches(filter_prefix)",
        "ModelPatcher.loaded_size()",
        "ModelPatcher.model_size()",
        "ModelPatcher.partially_load(device_to, extra_memory, force_patch_weights)",
        "ModelPatcher.partially_unload(device_to, memory_to_free)",
        "ModelPatcher.patch_model",
    ],
    "comfy.model_sampling": ["CONST.calculate_denoised", "CONST.calculate_input", "CONST.noise_scaling"],
    "comfy.patcher_extension": [
        "WrapperExecutor.execute",
        "WrapperExecutor.new_class_executor(original, class_obj, wrappers)",
        "WrappersMP.CALC_COND_BATCH",
        "WrappersMP.DIFFUSION_MODEL",
        "WrappersMP.OUTER_SAMPLE",
        "WrappersMP.PREDICT_NOISE",
        "WrappersMP.SAMPLER_SAMPLE",
        "get_all_wrappers(wrapper_type, transformer_options)",
    ],
    "comfy.samplers": [
        "CFGGuider.predict_noise(x, timestep, model_options, seed)",
        "KSAMPLER(sampler_function, extra_options, inpaint_options)",
        "KSAMPLER.sample(model_wrap, sigmas, extra_args, callback, noise)",
        "KSampler.SAMPLERS",
        "KSampler.SCHEDULERS",
        "KSamplerX0Inpaint(model, sigmas)",
        "sampler_object(name)",
    ],
    "comfy.supported_models_base": [
        "BASE.get_model(state_dict, prefix, device)",
        "BASE.process_unet_state_dict(state_dict)",
        "BASE.set_inference_dtype(dtype)",
    ],
    "comfy.utils": ["ProgressBar(total)", "ProgressBar.update_absolute(value)", "swap_scale_shift(weight)"],
    "comfy.weight_adapter": [
        "BOFTAdapter",
        "GLoRAAdapter",
        "LoHaAdapter",
        "LoKrAdapter",
        "LoRAAdapter",
        "OFTAdapter",
        "WeightAdapterBase",
    ],
    "comfy_api.latest": [
        "ComfyExtension",
        "io.ComfyNode",
        "io.Custom",
        "io.Hidden.extra_pnginfo",
        "io.Input(extra_dict)",
        "io.NodeOutput",
        "io.Schema",
    ],
    "comfy_execution.utils": ["get_executing_context()"],
    "execution": ["PromptQueue.get_current_queue_volatile()"],
    "folder_paths": [
        "add_model_folder_path(folder_name, full_folder_path)",
        "base_path",
        "folder_names_and_paths",
        "get_filename_list(folder_name)",
        "get_full_path(folder_name, filename)",
        "get_full_path_or_raise(folder_name, filename)",
        "get_user_directory()",
    ],
    "nodes": [
        "common_ksampler(model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent, denoise)",
    ],
    "server": ["PromptServer.send_progress_text(text, node_id, sid)", "PromptServer.send_sync(event, data, sid)"],
}
"""Module -> names in it, with the parameters that a call, or a method in its place, relies on."""


class UnsupportedComfyUI(ImportError):
    """A ComfyUI that lacks something of `USED`, or whose torch is too old."""

    __module__ = "FastUSP"  # as errors.FastUSPError says


def check() -> None:
    """Raises UnsupportedComfyUI naming what is missing."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH:
        wanted = ".".join(map(str, TORCH))
        raise UnsupportedComfyUI(
            f"Update ComfyUI's torch: FastUSP needs {wanted} or newer, and this is {torch.__version__}"
        )
    missing = [problem for module, uses in USED.items() for use in uses if (problem := _missing(module, use))]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UnsupportedComfyUI(
            f"Update ComfyUI, or FastUSP if ComfyUI is newer: FastUSP was tested with ComfyUI {TESTED}, and does not "
            f"run in this one (version {version()}): {missing[0]}{more}"
        )


def _missing(module: str, use: str) -> str | None:
    path, _, parameters = use.partition("(")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"it has no module {error.name}"
    except ImportError as error:
        return f"its module {module} cannot be imported ({error})"
    for name in path.split("."):
        if not hasattr(found, name):
            return f"{module}.{path} does not exist"
        found = getattr(found, name)
    wanted = [name for name in parameters.rstrip(")").split(", ") if name]
    if not wanted:
        return None
    has = inspect.signature(found).parameters
    lacking = [name for name in wanted if name not in has]
    if lacking and not any(p.kind is p.VAR_KEYWORD for p in has.values()):
        return f"{module}.{path} takes no {', '.join(lacking)}"
    return None


def version() -> str:
    """What this ComfyUI calls its version."""
    try:
        return importlib.import_module("comfyui_version").__version__
    except (ImportError, AttributeError):
        return "unknown"


check()

import comfy.k_diffusion.sampling as k_diffusion  # noqa: E402
import comfy.model_management as model_management  # noqa: E402
import comfy.samplers as samplers  # noqa: E402
import comfy.weight_adapter as weight_adapter  # noqa: E402
import folder_paths  # noqa: E402
from comfy.cli_args import args as command_line  # noqa: E402
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel  # noqa: E402
from comfy.model_detection import model_config_from_unet  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402
from comfy.model_sampling import CONST  # noqa: E402
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers  # noqa: E402
from comfy.utils import ProgressBar, swap_scale_shift  # noqa: E402
from comfy_api.latest import ComfyExtension, io  # noqa: E402
from comfy_execution.utils import get_executing_context  # noqa: E402
from server import PromptServer  # noqa: E402

from nodes import common_ksampler  # noqa: E402

__all__ = [
    "CONST",
    "ComfyExtension",
    "ModelPatcher",
    "ProgressBar",
    "PromptServer",
    "QwenImageTransformer2DModel",
    "WrapperExecutor",
    "WrappersMP",
    "advanced",
    "command_line",
    "common_ksampler",
    "dev_only",
    "folder_paths",
    "get_all_wrappers",
    "get_executing_context",
    "io",
    "k_diffusion",
    "model_config_from_unet",
    "model_management",
    "samplers",
    "search_aliases",
    "swap_scale_shift",
    "version",
    "weight_adapter",
]


@functools.cache
def _of_schemas() -> frozenset[str]:
    """What `io.Schema` takes. ComfyUI asks for a node's schema anew several times a prompt, and `inspect` takes 0.4 ms
    each time."""
    return frozenset(inspect.signature(io.Schema).parameters)


def advanced(entry: io.Input) -> io.Input:
    """The input, which the page then shows among the advanced ones. (As a parameter, ComfyUI has it since 0.10.)"""
    entry.extra_dict["advanced"] = True
    return entry


def search_aliases(*words: str) -> dict[str, list[str]]:
    """What a node is found by in the page beside its name, for `io.Schema`; nothing in a ComfyUI that does not know
    it."""
    return {"search_aliases": [*words]} if "search_aliases" in _of_schemas() else {}


def dev_only() -> dict[str, bool]:
    """For `io.Schema`: a node that is listed in ComfyUI's developer mode alone, where ComfyUI knows that."""
    return {"is_dev_only": True} if "is_dev_only" in _of_schemas() else {}
