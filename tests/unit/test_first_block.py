"""What the first block's cache decides by, and that what it leaves out is what the last blocks would have given."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from support import (
    SMALL,
    SMALL_CHROMA,
    SMALL_FLUX2,
    SMALL_QWEN,
    SMALL_SD3,
    SMALL_Z_IMAGE,
    OneRank,
    inputs,
    load_model,
    randn,
    relative_difference,
    spec_of,
)

from fastusp_backend.config import CacheRule, Layout
from fastusp_backend.engine import denoiser as denoisers
from fastusp_backend.engine import evaluation as evaluations
from fastusp_backend.engine.denoiser import WORKING_SET
from fastusp_backend.engine.first_block import FirstBlockCache
from fastusp_backend.models.family import Stage
from fastusp_backend.models.synthetic import random_state, write_checkpoint
from fastusp_backend.prompt import Prompt

pytestmark = pytest.mark.unit

CONFIGS = [SMALL, SMALL_FLUX2, SMALL_CHROMA, SMALL_QWEN, SMALL_SD3, SMALL_Z_IMAGE]
HALF = torch.tensor([0.5])


def cache_of(threshold=0.1, start=0.9, end=0.1, *, scale=1.0, layout=(1, 1, 1), position=0, gather=lambda own: [own]):
    ulysses, ring, batch = layout
    mesh = SimpleNamespace(layout=Layout(ulysses=ulysses, ring=ring, batch=batch), batch_position=position)
    rule = CacheRule(kind="first_block", threshold=threshold, start=start, end=end)
    return FirstBlockCache(rule, scale, mesh, gather)


def stage(first: torch.Tensor, others: torch.Tensor, x: torch.Tensor) -> tuple[Stage, Stage]:
    """The stages of an evaluation whose first block adds `first`, and the rest `others`."""
    return Stage(x, x + first), Stage(None, x + first + others, x)


FIRST, OTHERS, X = (randn(2, 6, 8, seed=seed) for seed in (1, 2, 3))
PROMPT, OTHER = Prompt(X), Prompt(X)


def skipped_to(cache, factor, *, tokens=6, prompt=PROMPT, timestep=HALF, prompts=1):
    """What an evaluation gives whose first block adds `factor` times what it added before."""
    return cache.of(prompt, timestep, prompts=prompts).skip_to(stage(factor * FIRST, OTHERS, X)[0], tokens)


def kept(cache, prompt=PROMPT, timestep=HALF, others=OTHERS):
    cache.of(prompt, timestep, prompts=1).keep(*stage(FIRST, others, X))
    return cache


def test_the_change_is_relative_to_what_it_was():
    cache = kept(cache_of(threshold=0.1))
    torch.testing.assert_close(skipped_to(cache, 1.09), X + 1.09 * FIRST + OTHERS)
    assert skipped_to(cache, 1.11) is None and skipped_to(cache, 0.89) is None
    assert skipped_to(cache, 0.91) is not None
    assert (cache.evaluations, cache.skipped) == (4, 2)


def test_a_threshold_of_nothing_skips_not_even_what_is_equal():
    assert skipped_to(kept(cache_of(threshold=0.0)), 1.0) is None


def test_what_the_others_add_goes_on_along_a_line_no_farther_than_it_is_long():
    """From 1 at 0.9 to 2 at 0.7: 2.5 at 0.6, but 3 at the most."""
    cache = kept(kept(cache_of(), timestep=torch.tensor([0.9])), timestep=torch.tensor([0.7]), others=2 * OTHERS)
    for timestep, factor in ((0.6, 2.5), (0.5, 3), (0.2, 3), (0.7, 2), (0.8, 2)):
        torch.testing.assert_close(
            skipped_to(cache, 1.0, timestep=torch.tensor([timestep])), X + FIRST + factor * OTHERS, atol=1e-5, rtol=1e-5
        )
    kept(cache, timestep=torch.tensor([0.7]), others=4 * OTHERS)  # once more at 0.7, as some samplers do
    torch.testing.assert_close(
        skipped_to(cache, 1.0, timestep=torch.tensor([0.6])), X + FIRST + 4.5 * OTHERS, atol=1e-5, rtol=1e-5
    )


def test_only_between_start_and_end_and_with_something_kept():
    cache = kept(cache_of(start=0.8, end=0.2, scale=1000.0), timestep=torch.tensor([900.0]))
    for timestep, skips in ((801.0, False), (800.0, True), (201.0, True), (200.0, False), (100.0, False)):
        assert (skipped_to(cache, 1.0, timestep=torch.tensor([timestep])) is not None) == skips, timestep
    assert skipped_to(cache, 1.0, prompt=OTHER, timestep=torch.tensor([500.0])) is None, "each prompt has its own"
    late = kept(cache_of(end=0.2), timestep=torch.tensor([0.1]))
    assert not late.kept, "nothing comes after it"


def test_padding_and_references_do_not_count():
    cache = kept(cache_of())
    changed = FIRST.clone()
    changed[:, 4:] *= 50
    of = cache.of(PROMPT, HALF, prompts=1)
    head = stage(changed, OTHERS, X)[0]
    assert of.skip_to(head, 4) is not None and of.skip_to(head, 5) is None
    alone = kept(cache_of(gather=lambda own: [own, [0.0, 1.0]])).of(PROMPT, HALF, prompts=1)
    assert alone.skip_to(head, 0) is not None, "a rank that has none of the image follows the others"


@pytest.mark.parametrize("others, alone, together", [(0.0, True, True), (1.0, True, False)])
def test_ranks_of_one_prompt_decide_together_and_groups_of_two_apart(others, alone, together):
    """Rank 0 of two; the other says by how much its part changed."""
    size = float(FIRST.abs().sum())
    for layout in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        for prompts in (1, 2):
            cache = kept(cache_of(layout=layout, gather=lambda own: [own, [others * size, size]]))
            skips = skipped_to(cache, 1.01, prompts=prompts) is not None
            groups = layout[2] if prompts > 1 else 1
            assert skips == (alone if groups > 1 else together)
            assert cache.evaluations == groups and cache.skipped == (skips + (others == 0) * (groups - 1))


@pytest.mark.parametrize("config", [SMALL, SMALL_FLUX2, SMALL_QWEN], ids=lambda config: config.family)
def test_the_change_is_that_of_the_image_without_its_references(tmp_path, config):
    write_checkpoint(str(tmp_path / "model"), config, seed=3)
    model = OneRank(load_model(spec_of(tmp_path / "model"), torch.device("cpu")))
    given = inputs(config, text=9, size=(6, 4))
    references = tuple(randn(1, config.channels, *size, seed=5) for size in ((10, 8), (4, 2)))
    prompt = Prompt(given.context, given.y, given.guidance, references=references)
    added, sums, stages = [], [], model.model.stages

    def watched(*arguments):
        for stage in stages(*arguments):
            if stage.before is not None:
                added.append((stage.after - stage.before)[:, : (6 // config.patch) * (4 // config.patch)])
            yield stage

    model.model.stages = watched
    cache = cache_of(0.0, 1.0, 0.0, scale=config.timestep_scale, gather=lambda own: (sums.append(own), [own])[1])
    for x in (given.x, given.x + randn(*given.x.shape, seed=6)):
        super(OneRank, model).__call__(x, given.timestep, [prompt], lambda: None, cache=cache)
    ((change, size),) = sums
    assert change == pytest.approx(float((added[1] - added[0]).abs().sum()), rel=1e-5)
    assert size == pytest.approx(float(added[0].abs().sum()), rel=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.family)
def test_the_end_of_every_family(tmp_path, config):
    """The same evaluation again, of which but the first block is computed, gives the same."""
    write_checkpoint(str(tmp_path / "model"), config, seed=3)
    model = OneRank(load_model(spec_of(tmp_path / "model"), torch.device("cpu")))
    given = inputs(config, text=9, size=(6, 4), batch=2)
    prompt = Prompt(given.context, given.y, given.guidance)
    began = []
    model.model.begin_block = began.append
    cache = cache_of(threshold=1e-3, start=1.0, end=0.0, scale=config.timestep_scale)

    def evaluate(cache):
        (velocity,) = super(OneRank, model).__call__(given.x, given.timestep, [prompt], lambda: None, cache=cache)
        return velocity

    plain = evaluate(None)
    whole = [*began]
    assert torch.equal(evaluate(cache), plain) and began == 2 * whole
    again = evaluate(cache)
    assert relative_difference(again, plain) < 1e-5 and cache.skipped == 1
    first = began[2 * len(whole) :]
    assert first == whole[: len(first)] and len(first) == 1 + config.image_blocks


class Graph:
    """Stands for a CUDA graph: what was captured is replayed once, with the values that it was captured with."""

    def __init__(self, compute, pool):
        GRAPHS.append(self)
        self._output = compute()

    def replay(self):
        return self._output


GRAPHS: list[Graph] = []


@pytest.fixture(scope="module")
def weights():
    return random_state(SMALL.build(), seed=0, dtype=torch.float32)


@pytest.fixture
def on_gpu(weights, monkeypatch):
    """evaluate(cache) -> the velocity of `prompt` at `x`, by a model on one rank whose evaluations are captured, as if
    it was a GPU."""
    monkeypatch.setattr(evaluations, "_Graph", Graph)
    GRAPHS.clear()
    model = OneRank(SMALL.build())
    model.model.load_state_dict(weights)
    given = inputs(SMALL, text=9, size=(6, 4))
    prompt = Prompt(given.context, given.y, given.guidance)
    made = evaluations.Evaluation.__init__

    def make(self, *arguments):
        made(self, *arguments)
        self._captures = True

    monkeypatch.setattr(evaluations.Evaluation, "__init__", make)

    def evaluate(cache=None):
        (found,) = super(OneRank, model).__call__(given.x, given.timestep, [prompt], lambda: None, cache=cache)
        return found

    return SimpleNamespace(evaluate=evaluate, model=model, x=given.x, prompt=prompt)


def test_nothing_is_captured_before_all_blocks_were_computed_once(on_gpu):
    """What was kept of a prompt is good for buffers that were made anew, which may begin with a skip: not even their
    second evaluation may be captured, where the other blocks compile and allocate for the first time."""
    skips = [True, True, False, False]
    cache = cache_of(0.5, 1.0, 0.0, scale=SMALL.timestep_scale, gather=lambda _: [[0.0, 1.0] if skips[0] else [1, 1]])
    wanted = on_gpu.evaluate(cache)
    on_gpu.model._evaluations.clear()
    for graphs in (0, 0, 0, 2):
        assert relative_difference(on_gpu.evaluate(cache), wanted) < 1e-5 and len(GRAPHS) == graphs
        skips.pop(0)
    assert (cache.evaluations, cache.skipped) == (5, 2)


def test_a_run_that_ends_with_a_skip_holds_nothing_afterwards(on_gpu):
    """An evaluation that knew itself would keep the model's memory, and graphs that NCCL waits for, until Python's
    collector comes."""
    skips = [False]
    cache = cache_of(0.5, 1.0, 0.0, scale=SMALL.timestep_scale, gather=lambda _: [[0.0, 1.0] if skips[0] else [1, 1]])
    on_gpu.evaluate(cache)
    skips[0] = True
    on_gpu.evaluate(cache)
    assert cache.skipped == 1 and len(GRAPHS) == 2
    (evaluation,) = map(weakref.ref, on_gpu.model._evaluations.values())
    gc.disable()
    try:
        on_gpu.model._evaluations.clear()
        assert evaluation() is None
    finally:
        gc.enable()


def test_graphs_of_a_run_with_a_cache_are_others(on_gpu, monkeypatch):
    """So memory is tried once more where the plain graph is there, and the other way round."""
    asked, empty = [], torch.empty
    cache = cache_of(0.0, 1.0, 0.0, scale=SMALL.timestep_scale)

    def tried(caches: bool) -> bool:
        asked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(denoisers.torch, "empty", lambda *shape, **more: (asked.append(shape), empty(0, **more))[1])
            on_gpu.model.probe_memory(on_gpu.x, [on_gpu.prompt], caches=caches)
        return (WORKING_SET * (9 + 6) * SMALL.hidden,) in asked

    assert tried(False) and tried(True)
    on_gpu.evaluate()
    assert tried(False) and tried(True), "nothing is captured yet"
    on_gpu.evaluate()
    assert not tried(False) and tried(True)
    on_gpu.evaluate(cache)
    assert len(GRAPHS) == 3 and not tried(False) and not tried(True)


def test_a_shape_that_was_evaluated_before_is_known(on_gpu):
    def known() -> bool:
        return on_gpu.model.probe_memory(on_gpu.x, [on_gpu.prompt])

    assert not known(), "its first evaluation compiles"
    for _ in range(2):  # the second is captured
        on_gpu.evaluate()
        assert known()
