"""Other engines on the same weights and inputs: each parallelises diffusers' own transformer in its way.

A peer runs in a process set of its own (enabling one changes diffusers for the whole process), with cuDNN's attention,
eager, compiled, and compiled in a CUDA graph. Packages are imported when their peer is asked for.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from common import MODELS, Case, random_inputs
from diffusers_models import arguments, diffusers_model, latents

from fastusp_backend.models.family import FamilyConfig, Transformer
from fastusp_backend.models.patchify import patch_grid

LEVELS = ("eager", "compile", "graph")

Run = Callable[[], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a peer is set up for."""

    config: FamilyConfig
    ranks: int
    even: bool
    """Whether the ranks divide all token counts."""
    text: int
    """Tokens of the first prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """Another engine that runs diffusers' models in parallel."""

    module: str
    """What must be installed."""
    setup: Callable[[torch.nn.Module, Task], torch.nn.Module]
    """(diffusers' model, task) -> the parallel model."""
    alone: bool = False
    """Whether it runs on one rank."""
    compile: Literal["blocks", "broken blocks", "wrapped blocks", "whole"] = "blocks"
    """What is compiled: each block without graph breaks, each with them and whatever wraps it, or the whole model."""
    lossy: bool = False
    """Whether it sends less exactly than it computes."""
    models: tuple[str, ...] = ("flux", "qwen")
    """Those that it knows."""


def _one_gpu(model, task: Task):
    if next(model.parameters()).is_cuda:
        model.set_attention_backend("_native_cudnn")
    return model


def _diffusers(kind: str):
    def setup(model, task: Task):
        from diffusers import ContextParallelConfig

        model.set_attention_backend("_native_cudnn")
        options = {f"{kind}_degree": task.ranks} | ({} if task.even else {f"{kind}_anything": True})
        model.enable_parallelism(config=ContextParallelConfig(**options))
        return model

    return setup


def _fsdp(model, task: Task):
    """Weights shared by FSDP2, block by block, each gathered while the one before computes."""
    from torch.distributed.fsdp import fully_shard

    model = _diffusers("ulysses")(model, task)
    blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]
    for block in blocks:
        fully_shard(block)
    for block, following in zip(blocks, blocks[1:], strict=False):
        block.set_modules_to_forward_prefetch([following])
    return fully_shard(model)


def _paraattention(ring: bool):
    def setup(model, task: Task):
        import para_attn.para_attn_interface as interface
        from para_attn.context_parallel import init_context_parallel_mesh
        from para_attn.context_parallel.diffusers_adapters.flux import parallelize_transformer

        for name in ("ulysses_attn_func", "ring_attn_func"):
            setattr(interface, name, _without_gqa(getattr(interface, name)))
        mesh = init_context_parallel_mesh(model.device.type, max_ring_dim_size=task.ranks if ring else 1)
        return parallelize_transformer(model, mesh=mesh)

    return setup


def _without_gqa(function):
    """ParaAttention's functions do not know the keyword that diffusers passes today."""

    def call(*tensors, enable_gqa=False, **options):
        return function(*tensors, **options)

    return call


def _cache_dit(ring: bool, **options):
    def setup(model, task: Task):
        import cache_dit

        degrees = {"ring_size": task.ranks} if ring else {"ulysses_size": task.ranks}
        parallelism = cache_dit.ParallelismConfig(**degrees, attention_backend="_native_cudnn", **options)
        cache_dit.enable_cache(model, cache_config=None, parallelism_config=parallelism)
        cache_dit.set_compile_configs(descent_tuning=False)  # with it, compiling takes minutes
        return model

    return setup


def _xdit(ring: bool):
    def setup(model, task: Task):
        import xdit

        degrees = {"ulysses": 1 if ring else task.ranks, "ring": task.ranks if ring else 1}
        return xdit.parallel(model, task.config, task.text, **degrees)

    return setup


PLANNED = tuple(name for name in MODELS if name not in ("chroma", "sd3", "sd35_medium", "sd3_medium", "z_image"))
"""diffusers has no plan for running Chroma, Stable Diffusion 3 or Z-Image in parallel."""

PEERS = {
    "diffusers-1gpu": Peer(module="diffusers", setup=_one_gpu, alone=True, models=MODELS),
    "diffusers-ulysses": Peer(module="diffusers", setup=_diffusers("ulysses"), models=PLANNED),
    "diffusers-ring": Peer(module="diffusers", setup=_diffusers("ring"), models=PLANNED),
    "diffusers-fsdp": Peer(module="diffusers", setup=_fsdp, compile="wrapped blocks", models=PLANNED),
    "paraattention-ulysses": Peer(module="para_attn", setup=_paraattention(ring=False), models=("flux",)),
    "paraattention-ring": Peer(module="para_attn", setup=_paraattention(ring=True), models=("flux",)),
    "xdit-ulysses": Peer(module="xfuser", setup=_xdit(ring=False), compile="whole", models=("flux", "sd3")),
    "xdit-ring": Peer(module="xfuser", setup=_xdit(ring=True), compile="whole", models=("flux", "sd3")),
    "cache-dit-ulysses": Peer(module="cache_dit", setup=_cache_dit(ring=False), compile="broken blocks"),
    "cache-dit-async": Peer(
        module="cache_dit", setup=_cache_dit(ring=False, ulysses_async=True), compile="broken blocks"
    ),
    "cache-dit-float8": Peer(
        module="cache_dit",
        setup=_cache_dit(ring=False, ulysses_async=True, ulysses_float8=True),
        compile="broken blocks",
        lossy=True,
    ),
    "cache-dit-ring": Peer(module="cache_dit", setup=_cache_dit(ring=True), compile="broken blocks"),
}


def runs(job: dict, ours: Transformer, dtype, device) -> Iterator[tuple[dict, Callable[[], Run]]]:
    """Yields each configuration of a job, described, with what makes its run. One rank's diffusers, eager, comes first:
    the others are compared with it."""
    peer, ranks = PEERS[job["who"]], dist.get_world_size()
    cases = [Case(**case) for case in job["cases"]]
    model = diffusers_model(ours)
    if not model._repeated_blocks:  # diffusers names none for Stable Diffusion 3
        model._repeated_blocks = ["JointTransformerBlock"]

    def evaluation(model, case: Case) -> Run:
        given = random_inputs(ours.config, case, device, dtype)
        keywords = arguments(ours.config, given, dtype)
        grid = patch_grid(*given.x.shape[-2:], ours.config.patch)

        @torch.no_grad()
        def run() -> torch.Tensor:
            return torch.stack([latents(ours.config, model(**each)[0], grid) for each in keywords])

        return run

    def row(case: Case, config: str) -> dict:
        return {"case": case, "config": config, "ranks": ranks, "reference": False, "lossy": peer.lossy}

    for case in cases:
        yield row(case, "eager") | {"ranks": 1, "reference": True}, functools.partial(evaluation, model, case)
    if device.type == "cuda":  # scaled_dot_product_attention then takes cuDNN's kernel
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    counts = {n for case in cases for n in (*case.texts, (case.size // 16) ** 2)}
    even = all(n % ranks == 0 for n in counts)
    model = peer.setup(model, Task(config=ours.config, ranks=ranks, even=even, text=cases[0].texts[0]))
    if "eager" in job["levels"]:
        for case in cases:
            yield row(case, "eager"), functools.partial(evaluation, model, case)
    if not {"compile", "graph"} & set(job["levels"]):
        return
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.automatic_dynamic_shapes = False  # each shape gets kernels of its own
    if peer.compile == "whole":
        model = torch.compile(model)
    elif peer.compile == "wrapped blocks":  # under other names
        for module in model.modules():
            if any(type(module).__name__.endswith(name) for name in model._repeated_blocks):
                module.compile()
    else:
        model.compile_repeated_blocks(fullgraph=peer.compile == "blocks")
    for case in cases:
        if "compile" in job["levels"]:
            yield row(case, "compile"), functools.partial(evaluation, model, case)
        if "graph" in job["levels"]:
            yield row(case, "graph"), lambda case=case: _graphed(evaluation(model, case))


def _graphed(run: Run) -> Run:
    """Returns a run that replays `run`'s kernels. It refers to `run`, and with it to the inputs: the kernels read them
    where they lay at the capture, and once they were freed, whoever allocates next would write there."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = run()

    def replay(_inputs: Run = run) -> torch.Tensor:
        graph.replay()
        return out

    return replay
