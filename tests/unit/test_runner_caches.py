"""What a rank makes of a run's rule for its cache: which one, with what, and what it asks of memory beforehand."""

from types import SimpleNamespace

import pytest
import torch
from support import SMALL, SOME_FILE, inputs

from fastusp_backend.config import CacheRule, Layout, ModelSpec, Settings
from fastusp_backend.prompt import Prompt
from fastusp_backend.protocol import Done, Sample
from fastusp_backend.sampling import Cache
from fastusp_backend.worker import runner as runners
from fastusp_backend.worker.runner import Runner

pytestmark = pytest.mark.unit

GIVEN = inputs(SMALL, text=7, size=(8, 6))
PROMPT = Prompt(GIVEN.context, GIVEN.y, GIVEN.guidance).tensors()
STEPS = 6


class Denoiser:
    """One that says what it was asked for."""

    def __init__(self):
        self.asked, self.caches = [], []

    def check(self, x, prompts): ...

    def prepare(self, timesteps, prompts): ...

    def probe_memory(self, x, prompts, **more):
        self.asked.append(more)

    def first_block_cache(self, rule, timestep_scale, gather):
        self.asked.append((rule, timestep_scale, gather))
        return FirstBlockCache()

    def __call__(self, x, timestep, prompts, go_on, residuals, cache):
        self.caches.append(cache)
        return [torch.full_like(x, 1 + n) for n in range(len(prompts))]


class FirstBlockCache:
    evaluations, skipped = 12, 5


@pytest.fixture
def run(monkeypatch):
    """run(kind, negative): its denoiser, with which options a `Cache` was made, what the client is told at the end.
    negative: how many tokens of text the negative prompt has, None without one."""
    monkeypatch.setattr(Runner, "_prepare", lambda self, request, build: build())
    monkeypatch.setattr(runners, "FirstBlockCache", FirstBlockCache)

    def of(kind: str | None, negative: int | None = None):
        denoiser, made, sent = Denoiser(), [], []
        engine = SimpleNamespace(
            device=torch.device("cpu"), spare=3, denoiser=lambda *_: denoiser, check_file=lambda: None
        )
        crew = SimpleNamespace(agree=lambda stop: stop, all_numbers=print)
        control = SimpleNamespace(send=lambda message, tensors: sent.append(message), cancelled=lambda request: False)

        class Easy(Cache):
            def __init__(self, *given, **more):
                made.append(more)
                super().__init__(*given, **more)

        monkeypatch.setattr(runners, "Cache", Easy)
        request = Sample(
            id=1,
            model=ModelSpec(path="/m", file=SOME_FILE, storage=None, compute="float32"),
            layout=Layout(ulysses=1, ring=1),
            settings=Settings(),
            sampler="euler",
            options={},
            timestep_scale=10.0,
            cfg=2.0,
            cache=kind and CacheRule(kind=kind, threshold=1e9, start=1.0, end=0.0),
        )
        tensors = {"x": GIVEN.x, "sigmas": torch.linspace(1, 0, STEPS + 1)}
        tensors |= {f"positive.{name}": tensor for name, tensor in PROMPT.items()}
        if negative is not None:
            tensors |= {f"negative.{name}": tensor for name, tensor in PROMPT.items()}
            tensors["negative.context"] = GIVEN.context[:, :negative]
        Runner(crew, engine, control)._sample(request, tensors)
        return denoiser, made, sent[-1]

    return of


@pytest.mark.parametrize("negative, together", [(None, False), (7, True), (5, False)])
def test_easy_measures_by_both_prompts_where_comfyui_evaluates_them_in_one_go(run, negative, together):
    denoiser, made, told = run("easy", negative)
    assert made == [{"together": together}]
    assert denoiser.asked == [{"evaluations": STEPS, "spare": 3, "caches": False}]
    assert denoiser.caches == [None, None], "two evaluations tell the ratio, and the others are skipped"
    assert isinstance(told, Done) and (told.evaluations, told.skipped) == (STEPS, STEPS - 2)


def test_the_first_blocks_cache_is_the_denoisers_and_counts_in_memory(run):
    denoiser, made, told = run("first_block", 7)
    (rule, scale, gather), probed = denoiser.asked
    assert not made and (rule.kind, scale, gather) == ("first_block", 10.0, print)
    assert probed == {"evaluations": STEPS, "spare": 3, "caches": True}
    assert len(denoiser.caches) == STEPS and all(isinstance(cache, FirstBlockCache) for cache in denoiser.caches)
    assert (told.evaluations, told.skipped) == (12, 5)


def test_without_a_rule_there_is_none(run):
    denoiser, made, told = run(None)
    assert not made and denoiser.caches == [None] * STEPS and (told.evaluations, told.skipped) == (0, 0)
    assert denoiser.asked == [{"evaluations": STEPS, "spare": 3, "caches": False}]
