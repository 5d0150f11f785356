"""The sampling loop in the workers, behind ComfyUI's own seam (WrappersMP.SAMPLER_SAMPLE).

The host keeps noise, masks, conditioning and latent scaling; only the sampler's function is exchanged for one that
hands sigmas, noise and conditioning to the workers and follows their steps. What the workers' loop cannot take
(obstacles.py) is sampled step by step from here instead, with the same result, and the node's status line says why.
"""

import contextlib
import copy
import inspect
import itertools
import time
from collections.abc import Callable

import torch
from tqdm.auto import trange

from ..fastusp_backend.errors import RequestError
from ..fastusp_backend.pool import Session
from ..fastusp_backend.prompt import Inpainting, Prompt
from ..fastusp_backend.sampling import SAMPLERS
from . import obstacles, step_caches
from .comfyui import k_diffusion
from .host import STOPPED, interruptible, progress
from .obstacles import PROMPT_FIELDS, evaluated_conditionings, name_in_workers, neutral, text_length, timestep_scale
from .remote_transformer import RemoteTransformer
from .status import node_status, push_pools, set_headline


def sample_in_workers(executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
    """A SAMPLER_SAMPLE wrapper."""
    obstacle = obstacles.in_sampler(executor.class_obj, guider)
    if obstacle is not None:
        callback = _step_from_here(obstacle, guider, sigmas, callback)
        return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
    sampler = copy.copy(executor.class_obj)
    sampler.sampler_function = _loop_for(sampler.sampler_function, guider)
    executor.class_obj, executor.original = sampler, sampler.sample
    return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)


def _step_from_here(obstacle: str, guider, sigmas: torch.Tensor, callback: Callable | None) -> Callable:
    """Says so, and returns the callback by which the steps are told of, too."""
    session: Session = guider.inner_model.diffusion_model.session
    cache = session.settings.cache
    set_headline("stepping" if cache == "off" else f"stepping, without cache = {cache}", reason=obstacle)
    pool, last, count = session.pool, None, itertools.count()
    cached = step_caches.HOLDER in guider.model_options.get("transformer_options", {})

    def stepped(*args) -> None:
        nonlocal last
        now = time.monotonic()
        # How much of the first was the loading of weights is not known.
        pool.stepped(next(count), len(sigmas) - 1, now - last if last is not None else None, cached=cached)
        last = now
        push_pools(now=False)
        if callback is not None:
            callback(*args)

    return stepped


class _Obstructed(Exception):
    """What was found when the workers had the request already: its text says what."""


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    # By the byte it would take four times as long.
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))


def _loop_for(function, guider):
    """A stand-in for ComfyUI's sampler function."""
    name = name_in_workers(function)

    def loop(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        # Only now: a wrapper between here and `sample_in_workers` may have changed any of it.
        cached = _cache_node(guider, x, extra_args)
        transformer: RemoteTransformer = guider.inner_model.diffusion_model
        begun = False

        def rehearsed() -> None:
            nonlocal begun
            begun, transformer.unobstructed = True, False
            aside = contextlib.nullcontext(extra_args) if cached is None else cached.set_aside(guider, extra_args)
            with aside as given:
                found = obstacles.in_rehearsal(model, guider, x, sigmas, given)
            transformer.unobstructed = found is None
            if found is not None:
                raise _Obstructed(found)

        obstacle = obstacles.in_run(model, guider, sigmas)
        if obstacle is None:
            try:
                # Where the last run met nothing, this one will not, mostly: the workers need not wait for it. Without
                # a seed noise is of torch's own generator, from which nothing may be drawn before.
                later = transformer.unobstructed and cached is None and extra_args.get("seed") is not None
                if not later:
                    rehearsed()
                more = {"meanwhile": rehearsed} if later else {}
                try:
                    return in_workers(model, x, sigmas, extra_args, callback, disable, options, cached, more)
                except STOPPED:
                    raise
                except Exception:
                    if not begun:  # another pack's conditioning, say, which the rehearsal finds
                        rehearsed()
                    raise
            except _Obstructed as found:
                obstacle = str(found)
        callback = _step_from_here(obstacle, guider, sigmas, callback)
        return function(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options)

    def in_workers(model, x, sigmas, extra_args, callback, disable, options, cached, more):
        transformer: RemoteTransformer = guider.inner_model.diffusion_model
        session = transformer.session
        if cached is not None and session.settings.cache != "off":
            raise RequestError(
                f"Remove the node {cached.holder.name}, or set cache = off in USP Optimization Settings: each of them "
                "skips steps of the same run"
            )
        batch = len(x)
        evaluations = 2 if len(evaluated_conditionings(guider)) > 1 else batch
        headline = f"{session.layout(evaluations)} on {session.pool.devices}, loop in the workers"
        set_headline(headline)
        prompts = {key: _prompt(parts[0], batch, transformer) for key, parts in evaluated_conditionings(guider).items()}
        options = {k: options.get(k, neutral(function, k)) for k in SAMPLERS[name].options}
        options = {k: v for k, v in options.items() if v is not inspect.Parameter.empty}
        bar = trange(len(sigmas) - 1, disable=disable)

        def step(event, tensors) -> None:
            node_status().restore()
            if callback is not None:
                given = {name: tensors[name].to(x.device, copy=True) for name in ("x", "denoised")}
                sigma = sigmas[event.index]
                callback({"i": event.index, "sigma": sigma, "sigma_hat": sigma} | given)
                if not all(_same_bits(tensor.cpu(), tensors[name]) for name, tensor in given.items()):
                    # ComfyUI's sampler would go on with them.
                    raise _Obstructed("a callback that changes the latents")
            bar.update(1)

        def done(event) -> None:
            if not event.evaluations:
                return
            what = "steps" if event.evaluations == len(sigmas) - 1 else "evaluations"
            set_headline(f"{headline}, {event.skipped} of {event.evaluations} {what} from the cache")
            if cached is not None:
                cached.tell(event.skipped)

        with interruptible(), contextlib.closing(bar):
            output = session.sample(
                x,
                sigmas.float().cpu(),
                sampler=name,
                options=options,
                noise=_draw_noise(name, x, sigmas, options, extra_args.get("seed")),
                mask=_mask(model, x, extra_args.get("denoise_mask")),
                cfg=guider.cfg,
                timestep_scale=timestep_scale(guider.inner_model.model_sampling),
                cache=None if cached is None else cached.rule,
                progress=progress(step, done=done),
                **prompts,
                **more,
            )
        return output.to(x.device)

    loop.__name__ = f"fastusp_{name}"
    return loop


def _cache_node(guider, x: torch.Tensor, extra_args: dict) -> step_caches.StepCache | None:
    compute = guider.inner_model.diffusion_model.session.model.compute
    prompts = [part for parts in evaluated_conditionings(guider).values() for part in parts or ()]
    joined = any("c_concat" in part["model_conds"] for part in prompts)
    converted = joined or getattr(torch, compute) != x.dtype
    return step_caches.step_cache(extra_args["model_options"], x, converted=converted)


def _prompt(conditioning: dict, batch: int, transformer: RemoteTransformer) -> Prompt:
    fields = {
        PROMPT_FIELDS[key]: value.process_cond(batch_size=batch, area=None).cond
        for key, value in conditioning["model_conds"].items()
        if key in PROMPT_FIELDS
    }
    fields["context"] = fields["context"][:, : text_length(conditioning["model_conds"], transformer)]
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
