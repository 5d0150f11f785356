"""FLUX.2 on every layout gives one rank's result: evaluations with and without guidance, and guided loops."""

import functools
from dataclasses import replace

import pytest
import torch
from support import SMALL_FLUX2, inputs, randn, relative_difference, spec_of

from fastusp_backend.config import Layout, Settings
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import Progress
from fastusp_backend.pool.session import Session
from fastusp_backend.prompt import Inpainting, Prompt

pytestmark = pytest.mark.dist

ONE = Layout(ulysses=1, ring=1)
LAYOUTS = [Layout(ulysses=u, ring=r) for u, r in ((2, 1), (1, 2), (1, 3), (2, 2), (4, 1), (1, 4))]
GROUPS = [Layout(batch=b, ulysses=u, ring=r) for b, u, r in ((2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1))]
# Text tokens, latent size, batch: fewer tokens than ranks, nothing that the ranks divide.
CASES = [(1, (1, 2), 1), (6, (5, 7), 2), (35, (10, 14), 1), (512, (7, 9), 1)]
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux2")
    write_checkpoint(str(folder / "dev"), SMALL_FLUX2, seed=3)
    write_checkpoint(str(folder / "klein"), replace(SMALL_FLUX2, guidance=False), seed=4)
    return folder


@pytest.fixture(scope="module")
def session_of(shared_pool, files):
    def make(layout: Layout, name: str = "dev", **settings) -> Session:
        return Session(shared_pool(layout.ranks), spec_of(files / name), (layout,), Settings(**settings))

    return make


@pytest.fixture(scope="module")
def expected(session_of):
    """What one rank gives, computed once."""
    return functools.cache(lambda make, *arguments, name="dev": make(session_of(ONE, name), *arguments))


def evaluate(session: Session, text: int, size: tuple[int, int], batch: int) -> torch.Tensor:
    given = inputs(SMALL_FLUX2, text=text, size=size, batch=batch, seed=text)
    return session.evaluate(given.x, given.timestep, Prompt(given.context, guidance=given.guidance), Progress())


@pytest.mark.parametrize("name", ["dev", "klein"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_evaluation(session_of, expected, layout, name):
    for case in CASES if name == "dev" else CASES[2:3]:
        got = evaluate(session_of(layout, name), *case)
        assert torch.isfinite(got).all()
        assert relative_difference(got, expected(evaluate, *case, name=name)) < TOLERANCE, case


@pytest.mark.parametrize("option", [{"wire": "fp8"}, {"wire": "int8"}, {"linear": "fp8"}], ids=str)
def test_lossy_options(session_of, expected, option):
    got = evaluate(session_of(LAYOUTS[0], **option), *CASES[2])
    assert 1e-5 < relative_difference(got, expected(evaluate, *CASES[2])) < 0.1


def sample(session: Session, cfg: float) -> torch.Tensor:
    positive, negative = (inputs(SMALL_FLUX2, text=n, size=(7, 5), batch=4, seed=n) for n in (35, 6))
    x, mask, image, noise = (randn(4, 128, 7, 5, seed=n) for n in range(4))
    return session.sample(
        x,
        torch.tensor([1.0, 0.6, 0.0]),
        sampler="heun",
        positive=Prompt(positive.context, guidance=positive.guidance),
        negative=Prompt(negative.context, guidance=negative.guidance) if cfg != 1 else None,
        cfg=cfg,
        mask=Inpainting(mask=(mask > 0).float(), latent_image=image, noise=noise),
    )


@pytest.mark.parametrize(
    "layout, cfg",
    [
        pytest.param(layout, cfg, marks=() if cfg == usual else pytest.mark.thorough, id=f"{layout}-{cfg}")
        for layout, usual in zip([LAYOUTS[0], LAYOUTS[3], *GROUPS[:3]], (1.0, 2.5, 2.5, 1.0, 2.5), strict=True)
        for cfg in (1.0, 2.5)
    ],
)
def test_a_loop(session_of, expected, layout, cfg):
    """Guided: prompts of two lengths."""
    assert relative_difference(sample(session_of(layout), cfg), expected(sample, cfg)) < TOLERANCE


def test_every_image_on_a_rank_of_its_own(session_of, expected):
    assert relative_difference(sample(session_of(GROUPS[3]), 1.0), expected(sample, 1.0)) < TOLERANCE
