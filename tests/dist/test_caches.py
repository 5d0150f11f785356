"""Evaluations that are skipped: all ranks skip alike, and the client is told how many."""

import time

import pytest
import torch
from support import SMALL, inputs, randn, relative_difference, spec_of

from fastusp_backend.config import Layout, Settings
from fastusp_backend.errors import Cancelled
from fastusp_backend.pool import Progress
from fastusp_backend.pool.session import Session
from fastusp_backend.prompt import Inpainting, Prompt
from fastusp_backend.sampling import SAMPLERS

pytestmark = pytest.mark.dist

TOLERANCE = 2e-5
SIZE, STEPS = (10, 8), 12
SIGMAS = torch.linspace(1, 0, STEPS + 1)
EASY = {"cache": "easy", "cache_threshold": 1.0, "cache_start": 0.1, "cache_end": 0.9}


@pytest.fixture(scope="module")
def session_of(shared_pool, dev):
    def make(*layout: int, **settings) -> Session:
        ulysses, ring, batch = (*layout, 1)[:3]
        layout = Layout(ulysses=ulysses, ring=ring, batch=batch)
        return Session(shared_pool(layout.ranks), spec_of(dev), (layout,), Settings(**settings))

    return make


def prompt(text: int, batch: int) -> Prompt:
    given = inputs(SMALL, text=text, size=SIZE, batch=batch, seed=text)
    return Prompt(given.context, given.y, given.guidance)


def sample(session: Session, *, batch=1, cfg=1.0, text=7, sampler="euler", mask=None, **progress):
    """(latents, evaluations, skipped)."""
    told = []
    draws = SAMPLERS[sampler].noise_draws(SIGMAS, {})
    latents = session.sample(
        randn(batch, SMALL.channels, *SIZE, seed=9),
        SIGMAS,
        sampler=sampler,
        positive=prompt(24, batch),
        negative=prompt(text, batch) if cfg != 1.0 else None,
        cfg=cfg,
        noise=randn(draws, batch, SMALL.channels, *SIZE, seed=3) if draws else None,
        mask=mask,
        progress=Progress(done=told.append, **progress),
    )
    return latents, told[-1].evaluations, told[-1].skipped


@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (1, 3), (1, 1, 2)], ids=str)
@pytest.mark.parametrize("more", [{"cfg": 3.0}, {"cfg": 3.0, "text": 24}, {"batch": 2, "sampler": "heun"}], ids=str)
def test_all_layouts_skip_alike(session_of, layout, more):
    """Prompts of one length and of two, images, and batch groups of either."""
    one, evaluations, skipped = sample(session_of(1, 1, **EASY), **more)
    assert evaluations == len(SAMPLERS[more.get("sampler", "euler")].evaluations(SIGMAS)) and 0 < skipped < evaluations
    two, *counts = sample(session_of(*layout, **EASY), **more)
    assert relative_difference(two, one) < TOLERANCE and counts == [evaluations, skipped]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_and_a_mask(session_of, sampler):
    ones = (randn(1, 1, *SIZE, seed=30) > 0).float().expand(1, SMALL.channels, *SIZE)
    image, noise = (randn(1, SMALL.channels, *SIZE, seed=seed) for seed in (31, 32))
    more = {"sampler": sampler, "mask": Inpainting(mask=ones, latent_image=image, noise=noise)}
    one, two = (sample(session_of(*layout, **EASY), **more) for layout in ((1, 1), (2, 1)))
    assert relative_difference(two[0], one[0]) < TOLERANCE and two[1:] == one[1:] and one[2] > 0


def test_what_skips_nothing_is_bit_equal_and_off_counts_nothing(session_of):
    off, *none = sample(session_of(2, 1), cfg=3.0)
    idle, *counts = sample(session_of(2, 1, **EASY | {"cache_threshold": 0.0}), cfg=3.0)
    assert torch.equal(idle, off) and none == [0, 0] and counts == [STEPS, 0]
    skipping, *_ = sample(session_of(2, 1, **EASY), cfg=3.0)
    assert relative_difference(skipping, off) > 10 * TOLERANCE
    again, *_ = sample(session_of(2, 1), cfg=3.0)
    assert torch.equal(again, off), "nothing is left behind"


def test_a_cancel_finds_ranks_that_skip(session_of):
    session = session_of(2, 1, **EASY)
    expected, *_ = sample(session, cfg=3.0)
    steps = []
    with pytest.raises(Cancelled):
        sample(session, cfg=3.0, step=lambda *step: steps.append(step), interrupted=lambda: len(steps) > 1)
    began = time.monotonic()
    again, *_ = sample(session, cfg=3.0)
    assert torch.equal(again, expected) and time.monotonic() - began < 30
