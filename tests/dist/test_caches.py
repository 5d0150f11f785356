"""Evaluations that are skipped: all ranks skip alike, and the client is told how many."""

import time
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from support import (
    SMALL,
    SMALL_CHROMA,
    SMALL_FLUX2,
    SMALL_QWEN,
    SMALL_SD3,
    SMALL_Z_IMAGE,
    inputs,
    randn,
    relative_difference,
    spec_of,
)
from test_patches import QKV, lora, stack

from fastusp_backend import shapes
from fastusp_backend.config import Layout, Settings
from fastusp_backend.errors import Cancelled, RequestError
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import Progress
from fastusp_backend.pool.session import Session
from fastusp_backend.prompt import Inpainting, Prompt
from fastusp_backend.sampling import SAMPLERS

pytestmark = pytest.mark.dist

TOLERANCE = 2e-5
SIZE, STEPS = (10, 8), 8
SIGMAS = torch.linspace(1, 0, STEPS + 1)
SPAN = {"cache_start": 0.2, "cache_end": 0.8}
EASY = SPAN | {"cache": "easy", "cache_threshold": 1.0}
FIRST = SPAN | {"cache": "first_block", "cache_threshold": 0.69}
KINDS = pytest.mark.parametrize(
    "settings", [pytest.param(EASY, marks=pytest.mark.thorough), FIRST], ids=["easy", "first_block"]
)
"""Of what is left of a run: easy begins each with a state of its own, first_block in tensors that stay."""
THRESHOLDS = {"flux": 0.69, "qwen": 1.2}
"""Where some of the steps are skipped, with references."""
FAMILIES = {
    "flux": SMALL,
    "flux2": SMALL_FLUX2,
    "chroma": SMALL_CHROMA,
    "qwen": SMALL_QWEN,
    "sd3": SMALL_SD3,
    "z_image": SMALL_Z_IMAGE,
}


@pytest.fixture(scope="module")
def session_of(shared_pool, dev, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")

    def make(*layout: int, family="flux", **settings) -> Session:
        ulysses, ring, batch = (*layout, 1)[:3]
        layout = Layout(ulysses=ulysses, ring=ring, batch=batch)
        path = dev if family == "flux" else folder / f"{family}.safetensors"
        if not path.exists():
            write_checkpoint(str(path), FAMILIES[family], seed=3)
        return Session(shared_pool(layout.ranks), spec_of(path), (layout,), Settings(**settings))

    return make


def prompt(config, text: int, batch: int, references=()) -> Prompt:
    given = inputs(config, text=text, size=SIZE, batch=batch, seed=text)
    return Prompt(given.context, given.y, given.guidance, references=references)


@pytest.fixture(scope="module")
def sampled(session_of):
    """sampled(layout, settings, **more): as `sample` of a session that has them, each computed once for all tests."""
    known = {}

    def of(layout: tuple[int, ...], settings: dict, **more) -> tuple[torch.Tensor, int, int]:
        key = str((layout, settings, more))
        if key not in known:
            known[key] = sample(session_of(*layout, **settings), **more)
        return known[key]

    return of


def sample(
    session: Session, config=SMALL, *, batch=1, cfg=1.0, text=7, sampler="euler", mask=None, references=(), **progress
):
    """(latents, evaluations, skipped)."""
    told = []
    draws = SAMPLERS[sampler].noise_draws(SIGMAS, {})
    latents = session.sample(
        randn(batch, config.channels, *SIZE, seed=9),
        SIGMAS,
        sampler=sampler,
        positive=prompt(config, 24, batch, references),
        negative=prompt(config, text, batch) if cfg != 1.0 else None,
        cfg=cfg,
        noise=randn(draws, batch, config.channels, *SIZE, seed=3) if draws else None,
        mask=mask,
        timestep_scale=config.timestep_scale,
        progress=Progress(done=told.append, **progress),
    )
    return latents, told[-1].evaluations, told[-1].skipped


ALIKE = [
    ((2, 1), {"cfg": 3.0}, "easy"),
    ((1, 3), {"cfg": 3.0, "text": 24}, "first_block"),
    ((1, 1, 2), {"cfg": 3.0}, ""),
    ((1, 1, 2), {"cfg": 3.0, "text": 24}, "easy, first_block"),
    ((1, 2), {"batch": 2, "sampler": "heun"}, ""),
    ((1, 1, 2), {"batch": 2, "sampler": "heun"}, "first_block"),
]
"""Layouts, what they sample, and with which kinds outside the thorough tests."""


@pytest.mark.parametrize(
    "layout, more, settings",
    [
        pytest.param(
            layout,
            more,
            settings,
            marks=() if settings["cache"] in kinds else pytest.mark.thorough,
            id=f"{settings['cache']}-{layout}-{more}",
        )
        for settings in (EASY, FIRST)
        for layout, more, kinds in ALIKE
    ],
)
def test_all_layouts_skip_alike(sampled, layout, more, settings):
    """Prompts of one length and of two, images, and batch groups of either."""
    one, evaluations, skipped = sampled((1, 1), settings, **more)
    calls = len(SAMPLERS[more.get("sampler", "euler")].evaluations(SIGMAS))
    assert evaluations == (2 * calls if settings is FIRST and "cfg" in more else calls) and 0 < skipped < evaluations
    two, *counts = sampled(layout, settings, **more)
    assert relative_difference(two, one) < TOLERANCE and counts == [evaluations, skipped]


@pytest.mark.parametrize(
    "sampler, settings",
    [*zip(SAMPLERS, cycle([EASY, FIRST]), strict=False)],
    ids=[f"{sampler}-{kind}" for sampler, kind in zip(SAMPLERS, cycle(["easy", "first_block"]), strict=False)],
)
def test_every_sampler_and_a_mask(session_of, sampler, settings):
    """With one kind each: a sampler sees what a skipped evaluation gives, not who gave it."""
    ones = (randn(1, 1, *SIZE, seed=30) > 0).float().expand(1, SMALL.channels, *SIZE)
    image, noise = (randn(1, SMALL.channels, *SIZE, seed=seed) for seed in (31, 32))
    more = {"sampler": sampler, "mask": Inpainting(mask=ones, latent_image=image, noise=noise)}
    settings = settings | {"cache_threshold": 1.0}
    one, two = (sample(session_of(*layout, **settings), **more) for layout in ((1, 1), (2, 1)))
    assert relative_difference(two[0], one[0]) < TOLERANCE and two[1:] == one[1:] and one[2] > 0


def test_what_skips_nothing_is_bit_equal_and_off_counts_nothing(session_of):
    off, *none = sample(session_of(2, 1), cfg=3.0)
    for settings, count in ((EASY, STEPS), (FIRST, 2 * STEPS)):
        idle, *counts = sample(session_of(2, 1, **settings | {"cache_threshold": 0.0}), cfg=3.0)
        assert torch.equal(idle, off) and none == [0, 0] and counts == [count, 0]
        skipping, *_ = sample(session_of(2, 1, **settings), cfg=3.0)
        assert relative_difference(skipping, off) > 10 * TOLERANCE
    again, *_ = sample(session_of(2, 1), cfg=3.0)
    assert torch.equal(again, off), "nothing is left behind"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_block_of_every_family(session_of, family):
    """At a threshold that nothing reaches all steps from start to end are skipped. Random weights do not go on along a
    line, so that it is far off."""
    config, high = FAMILIES[family], FIRST | {"cache_threshold": 1e9}
    one, evaluations, skipped = sample(session_of(1, 1, family=family, **high), config)
    assert (evaluations, skipped) == (STEPS, 5)
    layout = ((2, 1), (1, 2))[[*FAMILIES].index(family) % 2]
    two, *counts = sample(session_of(*layout, family=family, **high), config)
    assert relative_difference(two, one) < TOLERANCE and counts == [STEPS, 5]
    exact, *_ = sample(session_of(2, 1, family=family), config)
    idle, *_ = sample(session_of(2, 1, family=family, **FIRST | {"cache_threshold": 0.0}), config)
    assert torch.equal(idle, exact) and 10 * TOLERANCE < relative_difference(one, exact) < 0.6


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_a_rank_that_has_references_alone_skips_as_all_do(session_of, family):
    """20 tokens of the image before 40 of a reference: two of three ranks have none of the image."""
    config, settings = FAMILIES[family], FIRST | {"cache_threshold": THRESHOLDS[family]}
    references = (randn(1, config.channels, 20, 8, seed=40),)
    one, evaluations, skipped = sample(session_of(1, 1, family=family, **settings), config, references=references)
    assert evaluations == STEPS and 0 < skipped < 9
    for layout in ((2, 1), (1, 3)):
        two, *counts = sample(session_of(*layout, family=family, **settings), config, references=references)
        assert relative_difference(two, one) < TOLERANCE and counts == [evaluations, skipped]


@pytest.mark.parametrize("weights", ["shared", "host"])
def test_blocks_that_travel_are_not_left_out(session_of, weights):
    with pytest.raises(RequestError, match="^set cache = easy, or weights = whole where they fit, in USP Optimization"):
        sample(session_of(2, 1, weights=weights, **FIRST))
    latents, _, skipped = sample(session_of(2, 1, weights=weights, **EASY))
    assert skipped and torch.equal(latents, sample(session_of(2, 1, **EASY))[0])


@pytest.mark.parametrize(
    "layout, settings",
    [
        ((1, 2), FIRST),
        pytest.param((1, 1, 2), FIRST, marks=pytest.mark.thorough),
        pytest.param((1, 1, 2), EASY, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_with_8_bits(session_of, sampled, layout, settings):
    """Ranks that did not decide alike would wait for each other. For easy one decides for all, of every layout."""
    lossy, more = {"wire": "int8", "linear": "fp8"}, {"cfg": 3.0, "text": 24}
    latents, evaluations, skipped = sample(session_of(*layout, **settings, **lossy), **more)
    assert latents.isfinite().all() and 0 < skipped < evaluations == (2 if settings is FIRST else 1) * STEPS
    exact, *_ = sampled(layout, settings, **more)
    assert 10 * TOLERANCE < relative_difference(latents, exact) < 0.1


@KINDS
def test_nothing_of_other_weights_is_kept(session_of, settings):
    """A LoRA between two runs: as where the model is read anew, for patched weights lie in memory of their own."""
    plain = session_of(2, 1, **settings)
    patched = replace(plain, patches=stack({QKV: [lora(QKV, 1)]}))
    without = sample(plain, cfg=3.0)
    got, *counts = sample(patched, cfg=3.0)
    plain.pool.release()
    fresh, *again = sample(patched, cfg=3.0)
    assert torch.equal(got, fresh) and counts == again and counts[1]
    assert relative_difference(got, without[0]) > 1e-3
    back, *same = sample(plain, cfg=3.0)
    assert relative_difference(back, without[0]) < TOLERANCE and same == [*without[1:]]


@KINDS
def test_a_cancel_finds_ranks_that_skip(session_of, settings):
    session = session_of(2, 1, **settings)
    expected, *_ = sample(session, cfg=3.0)
    steps = []
    with pytest.raises(Cancelled):
        sample(session, cfg=3.0, step=lambda *step: steps.append(step), interrupted=lambda: len(steps) > 1)
    began = time.monotonic()
    again, *_ = sample(session, cfg=3.0)
    assert torch.equal(again, expected) and time.monotonic() - began < 30


def test_captions_stay_met(shared_pool):
    """28 steps of the model that draws: a modest threshold skips a third of them or more."""
    captions, sigmas, told = shapes.examples(1), torch.linspace(1, 0, 29), []
    noise = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(0))

    def drawn(**settings):
        layout = (Layout(ulysses=2, ring=1),)
        session = Session(shared_pool(2), spec_of(shapes.MODEL), layout, Settings(**settings))
        more = {"positive": shapes.prompt(captions), "progress": Progress(done=told.append)}
        pictures = shapes.decode(session.sample(noise, sigmas, sampler="euler", **more))
        return pictures, [not shapes.unmet(*pair) for pair in zip(captions, pictures, strict=True)]

    exact, met = drawn()
    for cache, threshold, bound in (("easy", 0.05, 35), ("first_block", 0.1, 40)):
        pictures, still_met = drawn(cache=cache, cache_threshold=threshold)
        assert still_met == met and all(met) and shapes.psnr(pictures, exact) > bound and told[-1].skipped > 28 / 3
