"""Z-Image on every layout gives one rank's result: evaluations whose streams learnt tokens fill up, a guided loop."""

import functools
from dataclasses import replace

import pytest
import torch
from support import SMALL_Z_IMAGE, inputs, randn, relative_difference, spec_of

from fastusp_backend.config import Layout, Settings
from fastusp_backend.errors import LayoutError
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.planner import plan, plan_batches
from fastusp_backend.pool import Progress
from fastusp_backend.pool.session import Session
from fastusp_backend.prompt import Inpainting, Prompt

pytestmark = pytest.mark.dist

SIX_HEADS = replace(SMALL_Z_IMAGE, hidden=768, heads=6, mlp=512)
LAYOUTS = [(2, 1), (1, 2), (1, 3), (2, 2)]
# Text tokens, latent size, batch: streams that end within a rank's part, such that 32 divides, fewer tokens than 32.
CASES = [(1, (2, 2), 1), (6, (7, 9), 2), (64, (16, 16), 1), (301, (14, 18), 1)]
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def session_of(shared_pool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for config in (SMALL_Z_IMAGE, SIX_HEADS):
        write_checkpoint(str(folder / f"{config.heads}.safetensors"), config, seed=3)

    def make(ulysses: int, ring: int, heads: int = 4, **settings) -> Session:
        layout = Layout(ulysses=ulysses, ring=ring)
        file = folder / f"{heads}.safetensors"
        return Session(shared_pool(layout.ranks), spec_of(file), (layout,), Settings(**settings))

    return make


@pytest.fixture(scope="module")
def expected(session_of):
    """expected(make, *what): what one rank gives, computed once."""
    return functools.cache(lambda make, *what, heads=4: make(session_of(1, 1, heads), *what))


def evaluate(session: Session, text: int, size: tuple[int, int], batch: int) -> torch.Tensor:
    given = inputs(SMALL_Z_IMAGE, text=text, size=size, batch=batch, seed=text)
    return session.evaluate(given.x, given.timestep, Prompt(given.context), Progress())


@pytest.mark.parametrize("ulysses, ring", LAYOUTS)
def test_an_evaluation(session_of, expected, ulysses, ring):
    for case in CASES:
        got = evaluate(session_of(ulysses, ring), *case)
        assert torch.isfinite(got).all()
        assert relative_difference(got, expected(evaluate, *case)) < TOLERANCE, case


@pytest.mark.parametrize("ulysses, ring", [(3, 1), (2, 2)])
def test_six_heads(session_of, expected, ulysses, ring):
    """32 tokens are not divided by three ranks."""
    for case in CASES[1:3]:
        got = evaluate(session_of(ulysses, ring, 6), *case)
        assert relative_difference(got, expected(evaluate, *case, heads=6)) < TOLERANCE, case


@pytest.mark.parametrize("wire, bound", [("fp8", 0.1), ("int8", 0.03)])
def test_what_travels_may_be_packed(session_of, expected, wire, bound):
    """Of the image alone as well, before there was any text."""
    case = (6, (10, 9), 2)
    for layout in ((2, 1), (1, 2)):
        got = evaluate(session_of(*layout, wire=wire), *case)
        assert 1e-4 < relative_difference(got, expected(evaluate, *case)) < bound


def sample(session: Session, cfg: float) -> torch.Tensor:
    positive, negative = (inputs(SMALL_Z_IMAGE, text=n, size=(7, 10), batch=2, seed=n) for n in (35, 6))
    latents = [randn(2, 16, 7, 10, seed=n) for n in range(4)]
    return session.sample(
        latents[0],
        torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0]),
        sampler="res_multistep",
        positive=Prompt(positive.context),
        negative=Prompt(negative.context) if cfg != 1.0 else None,
        cfg=cfg,
        mask=Inpainting(mask=(latents[1] > 0).float(), latent_image=latents[2], noise=latents[3]),
    )


@pytest.mark.parametrize("ulysses, ring", LAYOUTS)
def test_loops_with_and_without_guidance(session_of, expected, ulysses, ring):
    """Prompts of two lengths, where the heads are spread over ranks; without guidance elsewhere."""
    cfg = 2.5 if ulysses > 1 else 1.0
    assert relative_difference(sample(session_of(ulysses, ring), cfg), expected(sample, cfg)) < TOLERANCE
    assert relative_difference(expected(sample, 1.0), expected(sample, 2.5)) > 0.01


def test_prompts_in_batch_groups(shared_pool, session_of, expected):
    layout = Layout(batch=2, ulysses=1, ring=1)
    grouped = Session(shared_pool(2), session_of(1, 1).model, (layout,), Settings())
    assert relative_difference(sample(grouped, 2.5), expected(sample, 2.5)) < TOLERANCE


def test_the_layouts_of_thirty_heads():
    """Ulysses takes 2, 3, 5, 6, 10, 15 or 30 ranks; four share a sequence as 2 x 2."""
    chosen = {ranks: (plan(ranks, 30).ulysses, plan(ranks, 30).ring) for ranks in (1, 2, 3, 4, 5, 6, 8, 10, 15, 16)}
    assert chosen == {
        1: (1, 1),
        2: (2, 1),
        3: (3, 1),
        4: (2, 2),
        5: (5, 1),
        6: (6, 1),
        8: (2, 4),
        10: (10, 1),
        15: (15, 1),
        16: (2, 8),
    }
    assert [(x.batch, x.ring, x.ulysses) for x in plan_batches(4, 30)] == [(4, 1, 1), (2, 1, 2), (1, 2, 2)]
    legal = r"legal layout \(ulysses 2 x ring 2, ulysses 1 x ring 4\)"
    with pytest.raises(LayoutError, match=f"{legal}.* 4 does not divide the model's 30 attention heads"):
        plan(4, 30, ulysses=4)
