"""Step caches of other engines, over diffusers' FLUX.1 in parallel: whole runs of euler, which caches.py asks for.

Each is compiled as its authors advise: block by block and without CUDA graphs, since Python decides what is skipped.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from common import Case, Inputs, random_inputs, shipped_model
from diffusers_models import arguments, diffusers_model, latents
from peers import PEERS, Run, Task

from fastusp_backend import shapes
from fastusp_backend.models.family import Transformer
from fastusp_backend.models.patchify import patch_grid, patchify
from fastusp_backend.prompt import Prompt

WARM_UP = 2
"""Steps that are never skipped, of all engines."""

Skipped = Callable[[], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedPeer:
    """Another engine's cache."""

    parallel: str
    """The peer that runs the model in parallel."""
    attach: Callable[[torch.nn.Module], None]
    """Puts the cache into the model, once."""
    begin: Callable[[torch.nn.Module, float, int], Skipped]
    """(model, threshold, steps) before each run; what it returns says how many steps the run skipped."""


def _cache_dit(taylor: bool) -> CachedPeer:
    import cache_dit

    def attach(model) -> None:
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
        cache_dit.enable_cache(model, cache_config=config(0.0, 1), calibrator_config=calibrator)

    def config(threshold: float, steps: int):
        return cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=threshold,
            max_warmup_steps=WARM_UP,
            num_inference_steps=steps,
        )

    def begin(model, threshold: float, steps: int) -> Skipped:
        cache_dit.refresh_context(model, cache_config=config(threshold, steps), num_inference_steps=steps)
        return lambda: len(cache_dit.summary(model, logging=False)[0].cached_steps)

    return CachedPeer(parallel="cache-dit-ulysses", attach=attach, begin=begin)


def _paraattention() -> CachedPeer:
    from para_attn.first_block_cache import utils

    class Counting(utils.CacheContext):
        computed = 0

        def set_buffer(self, name, buffer):
            self.computed += name == "first_hidden_states_residual"
            super().set_buffer(name, buffer)

    def attach(model) -> None:
        """Their own adapter knows blocks as diffusers had them: its single blocks take image and text apart today, as
        the double ones do, so that both are blocks of one list here."""
        blocks = torch.nn.ModuleList([*model.transformer_blocks, *model.single_transformer_blocks])
        cached = utils.CachedTransformerBlocks(blocks, transformer=model, return_hidden_states_first=False)
        model.transformer_blocks, model.single_transformer_blocks = torch.nn.ModuleList([cached]), torch.nn.ModuleList()

    def begin(model, threshold: float, steps: int) -> Skipped:
        context = Counting(residual_diff_threshold=threshold, warmup_steps=WARM_UP)
        utils.set_current_cache_context(context)
        return lambda: context.executed_steps - context.computed

    return CachedPeer(parallel="paraattention-ulysses", attach=attach, begin=begin)


CACHES: dict[str, Callable[[], CachedPeer]] = {
    "cache-dit DBCache F1B0": lambda: _cache_dit(taylor=False),
    "cache-dit DBCache F1B0, TaylorSeer": lambda: _cache_dit(taylor=True),
    "ParaAttention first block": _paraattention,
}
MODULES = {name: "cache_dit" if name.startswith("cache-dit") else "para_attn" for name in CACHES}


def runs(job: dict, ours: Transformer, dtype, device) -> Iterator[tuple[dict, Callable[[], Run]]]:
    """Yields a run of `steps` steps of euler without the cache, then one for each of the job's thresholds; a job with
    `pictures` draws so many of the shipped model instead."""
    peer, ranks = CACHES[job["who"]](), dist.get_world_size()
    (case,) = (Case(**case) for case in job["cases"])
    if job["pictures"]:
        ours, given = shipped_model(device, dtype), captioned(job["pictures"], device, dtype)
    else:
        given = random_inputs(ours.config, case, device, dtype)
    model = diffusers_model(ours)
    if device.type == "cuda":
        torch.backends.cuda.enable_flash_sdp(False)  # scaled_dot_product_attention then takes cuDNN's kernel
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    grid = patch_grid(*given.x.shape[-2:], ours.config.patch)
    text = given.prompts[0].context.shape[1]
    if ranks > 1:
        even = all(n % ranks == 0 for n in (text, grid[0] * grid[1]))
        model = PEERS[peer.parallel].setup(model, Task(config=ours.config, ranks=ranks, even=even, text=text))
    if job["compiled"]:
        torch._dynamo.config.recompile_limit = 64
        model.compile_repeated_blocks(fullgraph=False)
    (keywords,), sigmas = arguments(ours.config, given, dtype), torch.linspace(1, 0, job["steps"] + 1).tolist()

    @torch.no_grad()
    def run(row: dict, threshold: float | None) -> torch.Tensor:
        skipped = (lambda: 0) if threshold is None else peer.begin(model, threshold, job["steps"])
        x = given.x.float()
        for now, after in zip(sigmas, sigmas[1:], strict=False):
            at = {
                "hidden_states": patchify(x, ours.config.patch).to(dtype),
                "timestep": torch.full((len(x),), now, device=device, dtype=dtype),
            }
            velocity = latents(ours.config, model(**keywords | at)[0], grid)
            x = x + (after - now) * velocity.float()
        row["skipped"] = skipped()
        return x

    for number, threshold in enumerate((None, *job["thresholds"])):
        if number == 1:
            peer.attach(model)
        row = {"case": case, "config": "off" if threshold is None else f"{threshold:g}", "ranks": ranks}
        row |= {"reference": False, "lossy": threshold is not None, "skipped": 0}
        yield row, lambda row=row, threshold=threshold: functools.partial(run, row, threshold)


def captioned(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Returns noise of 256 pixels squared and the prompt of so many captions, as inputs of the shipped model."""
    tensors = shapes.prompt(shapes.examples(count)).tensors()
    prompt = Prompt.from_tensors({name: tensor.to(device, dtype) for name, tensor in tensors.items()}, None)
    noise = torch.randn(count, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    return Inputs(noise.to(device), torch.ones(count), (prompt,))
