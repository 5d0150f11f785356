"""The sampling loop in the workers, behind ComfyUI's own seam (WrappersMP.SAMPLER_SAMPLE).

The host keeps noise, masks, conditioning and latent scaling; only the sampler's function is exchanged for one that
hands sigmas, noise and conditioning to the workers and follows their steps. What the workers' loop cannot take is
sampled step by step from here instead, with the same result, and the node's status line says why.
"""

import contextlib
import copy
import inspect
import math

import torch
from tqdm.auto import trange

from ..fastusp_backend.pool import Mask, Prompt, Session
from ..fastusp_backend.sampling import SAMPLERS
from .comfyui import CONST, CallbacksMP, WrappersMP, k_diffusion, samplers
from .host import following, progress
from .sampler_names import menu_name
from .status import node_status, set_headline

_BY_FUNCTION = {getattr(k_diffusion, f"sample_{name}"): name for name in SAMPLERS}

# Wrappers and callbacks that ComfyUI calls inside the loop: with one of them present the loop must run on the host.
_INNER_WRAPPERS = (
    WrappersMP.PREDICT_NOISE,
    WrappersMP.CALC_COND_BATCH,
    WrappersMP.APPLY_MODEL,
    WrappersMP.DIFFUSION_MODEL,
)
_INNER_CALLBACKS = (CallbacksMP.ON_PREPARE_STATE, CallbacksMP.ON_APPLY_HOOKS)
_KNOWN_MODEL_OPTIONS = {"transformer_options", "disable_cfg1_optimization", "to_load_options"}
_KNOWN_TRANSFORMER_OPTIONS = {"wrappers", "callbacks", "sample_sigmas"}
_PROMPT_FIELDS = {
    "c_crossattn": "context",
    "y": "y",
    "guidance": "guidance",
    "c_concat": "concat",
    "ref_latents": "references",
    "ref_latents_method": "reference_method",
}
# What ComfyUI leaves beside a prompt's tensors, without effect on the evaluation.
_PLAIN_CONDITIONING = {
    "model_conds",
    "uuid",
    "cross_attn",
    "pooled_output",
    "attention_mask",  # FLUX.2's text encoders give one; where it has an effect, model_conds holds it
    "guidance",
    "reference_latents",
    "reference_latents_method",
    "concat_latent_image",
    "concat_mask",
    "prompt_type",
    "width",
    "height",
}


def sample_in_workers(executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
    """A SAMPLER_SAMPLE wrapper."""
    obstacle = why_not(executor.class_obj, guider, sigmas, extra_args["model_options"])
    if obstacle is not None:
        set_headline("stepping from ComfyUI", since=obstacle)
        return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
    session: Session = guider.inner_model.diffusion_model.session
    evaluations = 2 if len(_prompts(guider)) > 1 else len(noise)
    set_headline(f"{session.layout(evaluations)} on {session.pool.devices}, loop in the workers")
    sampler = copy.copy(executor.class_obj)
    sampler.sampler_function = _loop_for(session, _BY_FUNCTION[sampler.sampler_function])
    executor.class_obj, executor.original = sampler, sampler.sample
    return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)


def why_not(sampler, guider, sigmas, model_options: dict) -> str | None:
    """What keeps this run out of the workers' loop, for people to read; None if nothing does."""
    function = getattr(sampler, "sampler_function", None)
    name = _BY_FUNCTION.get(function)
    if type(sampler) is not samplers.KSAMPLER or name is None:
        return f"no {menu_name(sampler)} in the workers"
    options = {k: v for k, v in sampler.extra_options.items() if v != _neutral(function, k)}
    foreign = options.keys() - SAMPLERS[name].options.keys()
    if foreign:
        return f"no option {', '.join(sorted(foreign))} of {name} in the workers"
    if len(sigmas) < 2:
        return "nothing to sample"
    if not isinstance(getattr(guider.inner_model.diffusion_model, "session", None), Session):
        return "the transformer was replaced"
    base = samplers.CFGGuider
    if any(getattr(type(guider), m) is not getattr(base, m) for m in ("predict_noise", "outer_predict_noise")):
        return f"{type(guider).__name__} has a guidance of its own"
    return (
        _why_not_options(model_options)
        or _why_not_schedule(guider.inner_model.model_sampling, sigmas)
        or _why_not_conditioning(guider)
    )


def _why_not_options(model_options: dict) -> str | None:
    unknown = model_options.keys() - _KNOWN_MODEL_OPTIONS
    options = model_options.get("transformer_options", {})
    unknown |= options.keys() - _KNOWN_TRANSFORMER_OPTIONS
    if unknown:
        return f"{', '.join(sorted(map(str, unknown)))} on the model"
    for kind, inner in (("wrappers", _INNER_WRAPPERS), ("callbacks", _INNER_CALLBACKS)):
        for point in inner:
            names = [str(key) for key, functions in options.get(kind, {}).get(point, {}).items() if functions]
            if names:
                return f"{point} wrapper on the model ({', '.join(names)})"
    return None


def _why_not_schedule(model_sampling, sigmas: torch.Tensor) -> str | None:
    kind = type(model_sampling)
    flow = all(
        getattr(kind, method, None) is getattr(CONST, method)
        for method in ("calculate_input", "calculate_denoised", "noise_scaling")
    )
    if not flow or getattr(model_sampling, "noise_scale", 1.0) != 1.0:
        return f"{kind.__name__} is no plain rectified flow"
    scale = _timestep_scale(model_sampling)
    if not torch.allclose(model_sampling.timestep(sigmas), sigmas * scale):
        return f"{kind.__name__} has its own timesteps"
    return None


def _why_not_conditioning(guider) -> str | None:
    for name, prompts in _prompts(guider).items():
        if prompts is None or len(prompts) != 1:
            return f"{len(prompts or ())} parts of the {name} conditioning"
        (prompt,) = prompts
        special = {k for k, v in prompt.items() if v is not None} - _PLAIN_CONDITIONING
        special |= prompt["model_conds"].keys() - _PROMPT_FIELDS.keys()
        if prompt.get("strength", 1.0) == 1.0:
            special.discard("strength")
        if special:
            return f"{', '.join(sorted(special))} on the {name} conditioning"
        if "c_crossattn" not in prompt["model_conds"]:
            return f"no prompt in the {name} conditioning"
    return None


def _prompts(guider) -> dict[str, list[dict] | None]:
    """The conditionings that are evaluated; at cfg 1 the negative one is not."""
    names = ["positive"] if math.isclose(guider.cfg, 1.0) else ["positive", "negative"]
    return {name: guider.conds.get(name) for name in names}


def _timestep_scale(model_sampling) -> float:
    return float(model_sampling.timestep(torch.ones(())))


def _neutral(function, option: str):
    """The default of a sampler function's option: passing it changes nothing."""
    parameter = inspect.signature(function).parameters.get(option)
    return parameter.default if parameter is not None else inspect.Parameter.empty


def _loop_for(session: Session, name: str):
    """A stand-in for ComfyUI's sampler function `name`."""

    def loop(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        guider, batch = model.inner_model, x.shape[0]
        prompts = {key: _prompt(parts[0], batch) for key, parts in _prompts(guider).items()}
        options = {k: v for k, v in options.items() if k in SAMPLERS[name].options}
        bar = trange(len(sigmas) - 1, disable=disable)

        def step(event, tensors) -> None:
            node_status().restore()
            if callback is not None:
                callback(
                    {
                        "i": event.index,
                        "x": tensors["x"].to(x.device),
                        "denoised": tensors["denoised"].to(x.device),
                        "sigma": sigmas[event.index],
                        "sigma_hat": sigmas[event.index],
                    }
                )
            bar.update(1)

        with following(), contextlib.closing(bar):
            output = session.sample(
                x,
                sigmas.float().cpu(),
                sampler=name,
                options=options,
                noise=_draw_noise(name, x, sigmas, options, extra_args.get("seed")),
                mask=_mask(model, x, extra_args.get("denoise_mask")),
                cfg=guider.cfg,
                timestep_scale=_timestep_scale(guider.inner_model.model_sampling),
                progress=progress(step),
                **prompts,
            )
        return output.to(x.device)

    loop.__name__ = f"fastusp_{name}"
    return loop


def _prompt(conditioning: dict, batch: int) -> Prompt:
    fields = {
        _PROMPT_FIELDS[key]: value.process_cond(batch_size=batch, area=None).cond
        for key, value in conditioning["model_conds"].items()
    }
    return Prompt(**fields | {"references": tuple(fields.get("references", ()))})


def _draw_noise(
    name: str, x: torch.Tensor, sigmas: torch.Tensor, options: dict, seed: int | None
) -> torch.Tensor | None:
    """All of the sampler's draws, from this host's own noise sampler: its seeding differs by version and device."""
    count = SAMPLERS[name].noise_draws(sigmas, options)
    if count == 0:
        return None
    draw = k_diffusion.default_noise_sampler(x, seed=seed)
    return torch.stack([draw(None, None) for _ in range(count)])


def _mask(model, x: torch.Tensor, denoise_mask: torch.Tensor | None) -> Mask | None:
    if denoise_mask is None:
        return None
    return Mask(mask=denoise_mask.to(x), latent_image=model.latent_image.to(x), noise=model.noise.to(x))
