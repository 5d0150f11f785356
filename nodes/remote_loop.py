"""The sampling loop in the workers, behind ComfyUI's own seam (WrappersMP.SAMPLER_SAMPLE).

The host keeps noise, masks, conditioning and latent scaling; only the sampler's function is exchanged for one that
hands sigmas, noise and conditioning to the workers and follows their steps. Before that it rehearses an evaluation
(rehearsal.py). What the workers' loop cannot take is sampled step by step from here instead, with the same result, and
the node's status line says why.
"""

import contextlib
import copy
import inspect
import math

import torch
from tqdm.auto import trange

from ..fastusp_backend.pool import Session
from ..fastusp_backend.prompt import Inpainting, Prompt
from ..fastusp_backend.sampling import SAMPLERS
from .comfyui import CONST, k_diffusion, samplers
from .host import following, progress
from .originals import owner
from .rehearsal import changed_sampler, rehearse
from .remote_transformer import RemoteTransformer, masks_nothing
from .sampler_names import menu_name
from .status import node_status, set_headline

_PROMPT_FIELDS = {
    "c_crossattn": "context",
    "y": "y",
    "guidance": "guidance",
    "c_concat": "concat",
    "ref_latents": "references",
    "ref_latents_method": "reference_method",
}


def sample_in_workers(executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
    """A SAMPLER_SAMPLE wrapper."""
    obstacle = why_not(executor.class_obj, guider)
    if obstacle is not None:
        _step_from_here(obstacle)
        return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
    sampler = copy.copy(executor.class_obj)
    sampler.sampler_function = _loop_for(sampler.sampler_function, guider)
    executor.class_obj, executor.original = sampler, sampler.sample
    return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)


def _step_from_here(obstacle: str) -> None:
    set_headline("stepping", since=obstacle)


def why_not(sampler, guider) -> str | None:
    """What keeps this run out of the workers' loop, for people to read, as far as it can be told of the sampler; None
    if nothing does."""
    function = getattr(sampler, "sampler_function", None)
    name = _name_in_workers(function)
    if type(sampler) is not samplers.KSAMPLER or name is None:
        return f"no {menu_name(sampler)} in the workers"
    options = {k: v for k, v in sampler.extra_options.items() if v != _neutral(function, k)}
    foreign = options.keys() - SAMPLERS[name].options.keys()
    if foreign:
        return f"no option {', '.join(sorted(foreign))} of {name} in the workers"
    if not isinstance(guider.inner_model.diffusion_model, RemoteTransformer):
        return f"{owner(guider.inner_model.diffusion_model)} replaced the transformer"
    return changed_sampler(name, guider.inner_model)


def _name_in_workers(function) -> str | None:
    """The name among SAMPLERS of what stands in ComfyUI as the sampler function of that name."""
    return next((name for name in SAMPLERS if getattr(k_diffusion, f"sample_{name}", None) is function), None)


def _why_not_schedule(model_sampling, sigmas: torch.Tensor) -> str | None:
    if len(sigmas) < 2:
        return "nothing to sample"
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
        special = {key for key, value in prompt["model_conds"].items() if not _is_taken(key, value)}
        if special:
            return f"{', '.join(sorted(special))} on the {name} conditioning"
        if "c_crossattn" not in prompt["model_conds"]:
            return f"no prompt in the {name} conditioning"
    return None


def _is_taken(key: str, value) -> bool:
    """Whether the loop honours what ComfyUI gives its transformer under this name."""
    return key in _PROMPT_FIELDS or key == "attention_mask" and masks_nothing(value.cond)


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


class _LatentsChanged(Exception):
    """A callback has written to the tensors that it was given: ComfyUI's sampler would go on with them."""


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _loop_for(function, guider):
    """A stand-in for ComfyUI's sampler function."""
    name = _name_in_workers(function)

    def loop(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        # Only now: a wrapper between here and `sample_in_workers` may have changed any of it.
        obstacle = (
            _why_not_schedule(guider.inner_model.model_sampling, sigmas)
            or _why_not_conditioning(guider)
            or rehearse(model, guider, x, sigmas, extra_args, list(_prompts(guider)))
        )
        if obstacle is None:
            try:
                return in_workers(model, x, sigmas, extra_args, callback, disable, options)
            except _LatentsChanged:
                obstacle = "a callback that changes the latents"
        _step_from_here(obstacle)
        return function(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options)

    def in_workers(model, x, sigmas, extra_args, callback, disable, options):
        session: Session = guider.inner_model.diffusion_model.session
        batch = len(x)
        evaluations = 2 if len(_prompts(guider)) > 1 else batch
        set_headline(f"{session.layout(evaluations)} on {session.pool.devices}, loop in the workers")
        prompts = {key: _prompt(parts[0], batch) for key, parts in _prompts(guider).items()}
        options = {k: options.get(k, _neutral(function, k)) for k in SAMPLERS[name].options}
        options = {k: v for k, v in options.items() if v is not inspect.Parameter.empty}
        bar = trange(len(sigmas) - 1, disable=disable)

        def step(event, tensors) -> None:
            node_status().restore()
            if callback is not None:
                given = {name: tensors[name].to(x.device, copy=True) for name in ("x", "denoised")}
                sigma = sigmas[event.index]
                callback({"i": event.index, "sigma": sigma, "sigma_hat": sigma} | given)
                if not all(_same_bits(tensor.cpu(), tensors[name]) for name, tensor in given.items()):
                    raise _LatentsChanged
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
        if key in _PROMPT_FIELDS
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


def _mask(model, x: torch.Tensor, denoise_mask: torch.Tensor | None) -> Inpainting | None:
    if denoise_mask is None:
        return None
    return Inpainting(mask=denoise_mask.to(x), latent_image=model.latent_image.to(x), noise=model.noise.to(x))
