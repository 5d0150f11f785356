"""Qwen-Image on every layout gives one rank's result: evaluations with and without the frame axis, a guided loop."""

import functools

import pytest
import torch
from support import SMALL_QWEN, inputs, randn, relative_difference, spec_of

from fastusp_backend.config import Layout, Settings
from fastusp_backend.errors import RequestError
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import Progress
from fastusp_backend.pool.session import Session
from fastusp_backend.prompt import Inpainting, Prompt

pytestmark = pytest.mark.dist

LAYOUTS = [(2, 1), (1, 2), (1, 3)]
# Text tokens, latent size, batch: odd numbers of patches, fewer tokens than ranks, nothing that the ranks divide.
CASES = [(1, (2, 2), 1), (6, (7, 9), 2), (35, (10, 14), 1), (301, (14, 18), 1)]
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def session_of(shared_pool, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "qwen.safetensors"
    write_checkpoint(str(path), SMALL_QWEN, seed=3)

    def make(ulysses: int, ring: int) -> Session:
        layout = Layout(ulysses=ulysses, ring=ring)
        return Session(shared_pool(layout.ranks), spec_of(path), (layout,), Settings())

    return make


@pytest.fixture(scope="module")
def expected(session_of):
    """expected(make, *what): what one rank gives, computed once."""
    return functools.cache(lambda make, *what: make(session_of(1, 1), *what))


def evaluate(session: Session, text: int, size: tuple[int, int], batch: int, framed: bool = False) -> torch.Tensor:
    given = inputs(SMALL_QWEN, text=text, size=size, batch=batch, seed=text)
    x = given.x[:, :, None] if framed else given.x
    return session.evaluate(x, given.timestep, Prompt(given.context), Progress())


@pytest.mark.parametrize("ulysses, ring", LAYOUTS)
def test_an_evaluation(session_of, expected, ulysses, ring):
    for case in CASES:
        got = evaluate(session_of(ulysses, ring), *case, framed=True)
        assert torch.isfinite(got).all()
        assert relative_difference(got, expected(evaluate, *case)[:, :, None]) < TOLERANCE, case


def sample(session: Session, cfg: float) -> torch.Tensor:
    positive, negative = (inputs(SMALL_QWEN, text=n, size=(7, 10), batch=2, seed=n) for n in (35, 6))
    frames = [randn(2, 16, 1, 7, 10, seed=n) for n in range(4)]
    return session.sample(
        frames[0],
        torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0]),
        sampler="heun",
        positive=Prompt(positive.context),
        negative=Prompt(negative.context),
        cfg=cfg,
        mask=Inpainting(mask=(frames[1] > 0).float(), latent_image=frames[2], noise=frames[3]),
    )


@pytest.mark.parametrize("ulysses, ring", LAYOUTS)
def test_a_guided_loop_with_prompts_of_two_lengths(session_of, expected, ulysses, ring):
    one = expected(sample, 2.5)
    assert one.shape == (2, 16, 1, 7, 10)
    assert relative_difference(sample(session_of(ulysses, ring), 2.5), one) < TOLERANCE
    assert relative_difference(expected(sample, 4.0), one) > 0.01


def test_layers_are_refused(session_of):
    prompt = Prompt(randn(1, 6, SMALL_QWEN.context, seed=0))
    with pytest.raises(RequestError, match="3 layers: Qwen-Image-Layered"):
        session_of(2, 1).evaluate(torch.zeros(1, 16, 3, 4, 4), torch.tensor([0.5]), prompt, Progress())
