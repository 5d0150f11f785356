"""Stable Diffusion 3 on every layout gives one rank's result: evaluations with a second attention, with blocks left out
and with a ControlNet's residuals, a guided loop."""

import functools

import pytest
import torch
from support import SMALL_SD3, inputs, randn, relative_difference, spec_of

from fastusp_backend.config import Layout, Settings
from fastusp_backend.errors import RequestError
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import Progress
from fastusp_backend.pool.session import Session
from fastusp_backend.prompt import Inpainting, Prompt

pytestmark = pytest.mark.dist

LAYOUTS = [(2, 1), (1, 2), (1, 3), (2, 2)]
# Text tokens, latent size, batch: odd numbers of patches, fewer tokens than ranks, nothing that the ranks divide.
CASES = [(1, (2, 2), 1), (6, (7, 9), 2), (35, (10, 14), 1), (301, (14, 18), 1)]
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def session_of(shared_pool, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "sd3.safetensors"
    write_checkpoint(str(path), SMALL_SD3, seed=3)

    def make(ulysses: int, ring: int, **settings) -> Session:
        layout = Layout(ulysses=ulysses, ring=ring)
        return Session(shared_pool(layout.ranks), spec_of(path), (layout,), Settings(**settings))

    return make


@pytest.fixture(scope="module")
def expected(session_of):
    """expected(make, *what): what one rank gives, computed once."""
    return functools.cache(lambda make, *what: make(session_of(1, 1), *what))


def evaluate(session: Session, text: int, size: tuple[int, int], batch: int, changed: bool = False) -> torch.Tensor:
    """changed: without a block, and with residuals for more tokens than the first rank has."""
    given = inputs(SMALL_SD3, text=text, size=size, batch=batch, seed=text)
    control = {"output": [randn(batch, 20, SMALL_SD3.hidden, seed=1), None, randn(1, 3, SMALL_SD3.hidden, seed=2)]}
    more = {"control": control, "skipped": [1]} if changed else {}
    return session.evaluate(given.x, given.timestep, Prompt(given.context, given.y), Progress(), **more)


@pytest.mark.parametrize("ulysses, ring", LAYOUTS)
def test_an_evaluation(session_of, expected, ulysses, ring):
    for case in CASES:
        got = evaluate(session_of(ulysses, ring), *case)
        assert torch.isfinite(got).all()
        assert relative_difference(got, expected(evaluate, *case)) < TOLERANCE, case


@pytest.mark.parametrize("ulysses, ring", LAYOUTS)
def test_blocks_left_out_and_residuals(session_of, expected, ulysses, ring):
    case = (6, (10, 9), 2)
    one = expected(evaluate, *case, True)
    assert relative_difference(evaluate(session_of(ulysses, ring), *case, True), one) < TOLERANCE
    assert relative_difference(one, expected(evaluate, *case)) > 0.01


@pytest.mark.parametrize("wire, bound", [("fp8", 0.1), ("int8", 0.03)])
def test_what_travels_may_be_packed(session_of, expected, wire, bound):
    """Rows of heads of 64 values, and of the image alone."""
    case = (6, (10, 9), 2)
    for layout in ((2, 1), (1, 2)):
        got = evaluate(session_of(*layout, wire=wire), *case)
        assert 1e-4 < relative_difference(got, expected(evaluate, *case)) < bound


def sample(session: Session, cfg: float) -> torch.Tensor:
    positive, negative = (inputs(SMALL_SD3, text=n, size=(7, 10), batch=2, seed=n) for n in (35, 6))
    latents = [randn(2, 16, 7, 10, seed=n) for n in range(4)]
    return session.sample(
        latents[0],
        torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0]),
        sampler="heun",
        positive=Prompt(positive.context, positive.y),
        negative=Prompt(negative.context, negative.y),
        cfg=cfg,
        timestep_scale=SMALL_SD3.timestep_scale,
        mask=Inpainting(mask=(latents[1] > 0).float(), latent_image=latents[2], noise=latents[3]),
    )


@pytest.mark.parametrize("ulysses, ring", LAYOUTS)
def test_a_guided_loop_with_prompts_of_two_lengths(session_of, expected, ulysses, ring):
    one = expected(sample, 2.5)
    assert one.shape == (2, 16, 7, 10)
    assert relative_difference(sample(session_of(ulysses, ring), 2.5), one) < TOLERANCE
    assert relative_difference(expected(sample, 4.0), one) > 0.01


def test_prompts_in_batch_groups(shared_pool, session_of, expected):
    layout = Layout(batch=2, ulysses=1, ring=1)
    grouped = Session(shared_pool(2), session_of(1, 1).model, (layout,), Settings())
    assert relative_difference(sample(grouped, 2.5), expected(sample, 2.5)) < TOLERANCE


def test_two_layouts_take_turns(shared_pool, session_of, expected):
    """Batch groups for the images of a batch, all ranks for one that leaves out a block: what either has is kept."""
    layouts = Layout(batch=2, ulysses=1, ring=1), Layout(ulysses=2, ring=1)
    both = Session(shared_pool(2), session_of(1, 1).model, layouts, Settings())
    for case in 2 * ((6, (10, 9), 2), (6, (10, 9), 1, True)):
        assert relative_difference(evaluate(both, *case), expected(evaluate, *case)) < TOLERANCE


def test_latents_that_are_too_large_are_refused(session_of):
    prompt = Prompt(randn(1, 6, SMALL_SD3.context, seed=0))
    with pytest.raises(RequestError, match="up to 192 x 192 pixels"):
        session_of(2, 1).evaluate(torch.zeros(1, 16, 4, 26), torch.tensor([500.0]), prompt, Progress())
