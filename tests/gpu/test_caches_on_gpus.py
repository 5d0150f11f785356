"""The first block's cache with CUDA graphs: two of a shape, of which the second is left out or not, in any order."""

import itertools
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from support import SMALL, OneRank, inputs, relative_difference
from test_evaluation import CONFIGS, model_of

from fastusp_backend.config import CacheRule, Layout, ModelSpec, Settings
from fastusp_backend.devices import Devices
from fastusp_backend.engine.first_block import FirstBlockCache
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import Pool, Progress, Session
from fastusp_backend.prompt import Prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EAGER = Settings(compile=False, cuda_graphs=False, overlap=False)
SKIPS = [0, 1, 0, 0, 1, 1, 0, 1, 1, 0]
"""Of each prompt's evaluations but the first, which cannot be."""


def run(model, settings: Settings) -> tuple[list[torch.Tensor], OneRank]:
    """Evaluations of prompts of two lengths and one of another size in turn, which skip as SKIPS says."""
    denoiser = OneRank(model, settings, torch.bfloat16, "cuda:0")
    calls = itertools.count()

    def scripted(_sums):
        return [[0.0, 1.0] if SKIPS[next(calls) // 3] else [1.0, 1.0]]

    config = model.config
    rule = CacheRule(kind="first_block", threshold=0.5, start=1.0, end=0.0)
    mesh = SimpleNamespace(layout=Layout(ulysses=1, ring=1), batch_position=0)
    cache = FirstBlockCache(rule, config.timestep_scale, mesh, scripted)
    cases = []
    for text, size in ((24, (32, 32)), (7, (32, 32)), (24, (33, 40))):
        given = inputs(config, text=text, size=size, seed=text)
        tensors = [None if t is None else t.cuda() for t in (given.context, given.y, given.guidance)]
        cases.append((given.x.cuda(), Prompt(*tensors)))
    found = []
    for turn in range(1 + len(SKIPS)):
        t = torch.tensor([config.timestep_scale * (0.95 - 0.05 * turn)])
        for x, prompt in cases:
            (velocity,) = super(OneRank, denoiser).__call__(
                x * (1 - 0.02 * turn), t, [prompt], lambda: None, cache=cache
            )
            found.append(velocity.float())
    assert cache.skipped == 3 * sum(SKIPS)
    return found, denoiser


@pytest.mark.parametrize("family, config", CONFIGS)
def test_graphs_are_what_eager_evaluations_are(family, config):
    model = model_of(family, config)
    (fast, denoiser), (plain, _) = run(model, Settings()), run(model, EAGER)
    assert all(cached.captured for cached in denoiser.evaluations.values())
    for turn, (got, wanted) in enumerate(zip(fast, plain, strict=True)):
        assert ((got - wanted).norm() / wanted.norm()).item() < 3e-2, f"evaluation {turn}"
    again, _ = run(model, Settings())
    assert all(torch.equal(*pair) for pair in zip(again, fast, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=str)
def test_two_gpus_skip_as_one_does(tmp_path, layout):
    path = tmp_path / "flux.safetensors"
    write_checkpoint(str(path), SMALL, dtype=torch.bfloat16)
    spec = ModelSpec.of_file(str(path), storage=None, compute="bfloat16")
    ulysses, ring, batch = layout

    def sampled(pool: Pool, over: Layout, **settings):
        told, given = [], inputs(SMALL, text=24, size=(16, 12), seed=3)
        prompts = [Prompt(context, given.y, given.guidance) for context in (given.context, given.context * 0.5)]
        latents = Session(pool, spec, (over,), Settings(cache_start=0.1, cache_end=0.9, **settings)).sample(
            given.x,
            torch.linspace(1, 0, 13),
            sampler="euler",
            positive=prompts[0],
            negative=prompts[1],
            cfg=2.0,
            progress=Progress(done=told.append),
        )
        return latents, told[-1].skipped

    two, one = Layout(ulysses=ulysses, ring=ring, batch=batch), Layout(ulysses=1, ring=1)
    first = {"cache": "first_block", "cache_threshold": 1e9}
    with closing(Pool(Devices(ranks=2, gpus=(0, 1)))) as pool:
        off, never = sampled(pool, two), sampled(pool, two, **first | {"cache_threshold": 0.0})
        got, skips = sampled(pool, two, **first)
    with closing(Pool(Devices(ranks=1, gpus=(0,)))) as pool:
        wanted, alone = sampled(pool, one, **first)
    assert skips == alone == 18 and relative_difference(got, wanted) < 0.05
    assert torch.equal(never[0], off[0]) and never[1] == 0
