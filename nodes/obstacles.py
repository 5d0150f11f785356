"""Why a run leaves the workers' loop: everything that keeps one out of it, each as a text for the node's status line.

The loop leaves out what ComfyUI does around the transformer at each step. It takes a run only where that makes no
difference, and what it cannot take is stepped from ComfyUI, with the same result. What the sampler alone tells is asked
before ComfyUI prepares the run (`in_sampler`), all else right before the loop (`in_run`), since wrappers in between may
change it. Last of all one evaluation is rehearsed (`in_rehearsal`), which finds what other packs have changed.
"""

import inspect
import math
from types import CodeType

import torch

from ..fastusp_backend.sampling import SAMPLERS
from . import provenance, reachable
from .call_tracer import changed_in
from .comfyui import CONST, k_diffusion, samplers
from .rehearsal import rehearse
from .remote_transformer import RemoteTransformer
from .sampler_names import menu_name

PROMPT_FIELDS = {
    "c_crossattn": "context",
    "y": "y",
    "guidance": "guidance",
    "c_concat": "concat",
    "ref_latents": "references",
    "ref_latents_method": "reference_method",
}
"""What ComfyUI's transformer is given under a name -> the field of a `Prompt` that it becomes."""


def in_sampler(sampler, guider) -> str | None:
    """The obstacle that a run's sampler is, or its transformer; None if neither is one."""
    function = getattr(sampler, "sampler_function", None)
    name = name_in_workers(function)
    if type(sampler) is not samplers.KSAMPLER or name is None:
        return f"no {menu_name(sampler)} in the workers"
    options = {k: v for k, v in sampler.extra_options.items() if v != neutral(function, k)}
    foreign = options.keys() - SAMPLERS[name].options.keys()
    if foreign:
        return f"no option {', '.join(sorted(foreign))} of {name} in the workers"
    if not isinstance(guider.inner_model.diffusion_model, RemoteTransformer):
        return f"{provenance.owner(guider.inner_model.diffusion_model)} replaced the transformer"
    return _change_of_sampler(name, guider.inner_model)


def in_run(model, guider, sigmas: torch.Tensor) -> str | None:
    """The obstacle that a run meets as its sampler function is called with these, but for what a rehearsal finds; None
    if there is none."""
    if type(model) is not samplers.KSamplerX0Inpaint or model.inner_model is not guider:
        return f"{provenance.owner(model)} wraps the model in {type(model).__name__}"
    return _in_schedule(guider.inner_model.model_sampling, sigmas) or _in_conditioning(guider)


def in_rehearsal(model, guider, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict) -> str | None:
    """The obstacle that a rehearsal finds, where `in_run` has found none."""
    return rehearse(model, guider, x, sigmas, extra_args, list(evaluated_conditionings(guider)))


def _in_schedule(model_sampling, sigmas: torch.Tensor) -> str | None:
    if len(sigmas) < 2:
        return "nothing to sample"
    kind = type(model_sampling)
    flow = all(
        getattr(kind, method, None) is getattr(CONST, method)
        for method in ("calculate_input", "calculate_denoised", "noise_scaling")
    )
    if not flow or getattr(model_sampling, "noise_scale", 1.0) != 1.0:
        return f"{kind.__name__} is not a plain rectified flow"
    scale = timestep_scale(model_sampling)
    if not torch.allclose(model_sampling.timestep(sigmas), sigmas * scale):
        return f"{kind.__name__} has its own timesteps"
    return None


def _in_conditioning(guider) -> str | None:
    for name, prompts in evaluated_conditionings(guider).items():
        if prompts is None or len(prompts) != 1:
            return f"{len(prompts or ())} parts of the {name} conditioning"
        (prompt,) = prompts
        given, transformer = prompt["model_conds"], guider.inner_model.diffusion_model
        special = given.keys() - PROMPT_FIELDS.keys() - transformer.ignored
        if "c_crossattn" in given and text_length(given, transformer) is not None:
            special -= {"attention_mask"}
        if special:
            return f"{', '.join(sorted(special))} on the {name} conditioning"
        if "c_crossattn" not in given:
            return f"no prompt in the {name} conditioning"
    return None


def text_length(model_conds: dict, transformer: RemoteTransformer) -> int | None:
    """How many of a conditioning's text tokens count; None where the loop cannot honour its attention mask."""
    tokens, mask = model_conds["c_crossattn"].cond.shape[1], model_conds.get("attention_mask")
    if mask is None or "attention_mask" in transformer.ignored:
        return tokens
    lengths = transformer.shown(mask.cond, tokens)
    return lengths[0] if lengths is not None and len(set(lengths)) == 1 else None


def _change_of_sampler(name: str, model) -> str | None:
    """What somebody has changed of ComfyUI's sampler function `name`, or of what it uses of a model (BaseModel); None
    if nothing."""
    used: set[CodeType] = set()
    for place in reachable.reached(k_diffusion, f"sample_{name}", "comfy."):
        change = _changed_at(place)
        if change is not None:
            return change
        used |= {*reachable.codes_at(place)}
    names = frozenset().union(*map(provenance.names_in, used))
    for instance in (model, model.model_sampling):
        change = changed_in(instance, names, every=True)
        if change is not None:
            return change
    return None


def _changed_at(place: reachable.Place) -> str | None:
    value = vars(place.module).get(place.name)
    if place.name in provenance.names(place.module):
        if provenance.is_original(place.module, place.name):
            return None
        return provenance.change_of(place.module, place.name, value)
    change = reachable.changed(place)
    return None if change is None else provenance.change_of(place.module, *change)


def name_in_workers(function) -> str | None:
    """The name among SAMPLERS of what stands in ComfyUI as the sampler function of that name."""
    return next((name for name in SAMPLERS if getattr(k_diffusion, f"sample_{name}", None) is function), None)


def evaluated_conditionings(guider) -> dict[str, list[dict] | None]:
    """The conditionings that are evaluated; at cfg 1 the negative one is not."""
    names = ["positive"] if math.isclose(guider.cfg, 1.0) else ["positive", "negative"]
    return {name: guider.conds.get(name) for name in names}


def timestep_scale(model_sampling) -> float:
    return float(model_sampling.timestep(torch.ones(())))


def neutral(function, option: str):
    """The default of a sampler function's option: passing it changes nothing."""
    parameter = inspect.signature(function).parameters.get(option)
    return parameter.default if parameter is not None else inspect.Parameter.empty
