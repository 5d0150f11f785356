"""The batch axis: prompts or images evaluated by different ranks give one rank's result."""

import functools

import pytest
import torch
from support import SMALL, inputs, relative_difference, spec_of

from fastusp_backend.config import Layout, Settings
from fastusp_backend.errors import RequestError
from fastusp_backend.pool import Progress, Session
from fastusp_backend.prompt import Prompt

pytestmark = pytest.mark.dist

LAYOUTS = [
    Layout(batch=2, ulysses=1, ring=1),
    Layout(batch=2, ulysses=2, ring=1),
    Layout(batch=2, ulysses=1, ring=2),
    Layout(batch=4, ulysses=1, ring=1),
]
TOLERANCE = 2e-5
SIZE = (10, 7)


def session(shared_pool, dev, *layouts: Layout) -> Session:
    return Session(shared_pool(layouts[0].ranks), spec_of(dev), layouts, Settings())


def prompt(text: int, batch: int, seed: int) -> Prompt:
    given = inputs(SMALL, text=text, size=SIZE, batch=batch, seed=seed)
    return Prompt(given.context, given.y, given.guidance)


def sample(over: Session, *, batch: int, cfg: float, sampler: str = "heun") -> torch.Tensor:
    x = inputs(SMALL, text=24, size=SIZE, batch=batch, seed=1).x
    return over.sample(
        x,
        torch.tensor([1.0, 0.7, 0.3, 0.0]),
        sampler=sampler,
        positive=prompt(35, batch, 2),
        negative=prompt(6, batch, 3) if cfg != 1.0 else None,
        cfg=cfg,
    )


def evaluate(over: Session) -> torch.Tensor:
    """As ComfyUI batches cond and uncond: four images, each with a timestep and guidance of its own."""
    given = inputs(SMALL, text=7, size=SIZE, batch=4, seed=4)
    mixed = Prompt(given.context, given.y, torch.tensor([1.0, 2.0, 3.5, 5.0]))
    timestep = torch.tensor([0.9, 0.7, 0.5, 0.3])
    # The second time the workers hold the prompt.
    return torch.stack([over.evaluate(given.x, timestep, mixed, Progress()) for _ in range(2)])


@pytest.fixture(scope="module")
def alone(shared_pool, dev):
    """alone(make, **how): what one rank gives, computed once."""
    one = session(shared_pool, dev, Layout(ulysses=1, ring=1))
    return functools.cache(lambda make, **how: make(one, **how))


@pytest.mark.parametrize(
    "batch, layout",
    [
        (1, LAYOUTS[0]),
        (1, LAYOUTS[1]),
        (3, LAYOUTS[2]),
        pytest.param(3, LAYOUTS[0], marks=pytest.mark.thorough),
        pytest.param(3, LAYOUTS[1], marks=pytest.mark.thorough),
        pytest.param(1, LAYOUTS[2], marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_prompts_of_different_lengths_are_shared_out(shared_pool, dev, alone, layout, batch):
    got = sample(session(shared_pool, dev, layout), batch=batch, cfg=3.0)
    assert relative_difference(got, alone(sample, batch=batch, cfg=3.0)) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_images_of_a_batch_are_shared_out(shared_pool, dev, alone, layout):
    got = sample(session(shared_pool, dev, layout), batch=4, cfg=1.0)
    assert relative_difference(got, alone(sample, batch=4, cfg=1.0)) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_evaluation_of_a_batch(shared_pool, dev, alone, layout):
    assert relative_difference(evaluate(session(shared_pool, dev, layout)), alone(evaluate)) < TOLERANCE


def test_a_session_takes_the_layout_that_divides_its_evaluations(shared_pool, dev, alone):
    split, whole = LAYOUTS[0], Layout(ulysses=2, ring=1)
    over = session(shared_pool, dev, split, whole)
    assert [over.layout(n) for n in (1, 2, 3, 4)] == [whole, split, whole, split]
    for batch, cfg in ((1, 1.0), (1, 3.0), (2, 1.0)):
        got = sample(over, batch=batch, cfg=cfg)
        assert relative_difference(got, alone(sample, batch=batch, cfg=cfg)) < TOLERANCE


def test_groups_that_do_not_divide_the_evaluations_are_refused(shared_pool, dev, alone):
    with pytest.raises(RequestError, match="2 batch groups do not divide 3 evaluations"):
        sample(session(shared_pool, dev, LAYOUTS[0]), batch=3, cfg=1.0)
