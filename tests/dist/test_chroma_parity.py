"""Chroma on every layout gives one rank's result: evaluations, with a ControlNet's residuals as well, and guided loops,
whose modulations are the work of the one rank that has the approximator."""

import functools

import pytest
import torch
from support import SMALL_CHROMA, inputs, randn, relative_difference, spec_of

from fastusp_backend.config import Layout, Settings, WeightPatch
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import Progress, WeightPatches, name_of
from fastusp_backend.pool.session import Session
from fastusp_backend.prompt import Inpainting, Prompt

pytestmark = pytest.mark.dist

ONE = Layout(ulysses=1, ring=1)
LAYOUTS = [Layout(ulysses=u, ring=r) for u, r in ((2, 1), (1, 2), (1, 3), (2, 2))]
GROUPS = [Layout(batch=2, ulysses=1, ring=1), Layout(batch=2, ulysses=2, ring=1)]
# Text tokens, latent size, batch: fewer tokens than ranks, odd numbers of patches, nothing that the ranks divide.
CASES = [(1, (2, 2), 1), (6, (7, 9), 2), (35, (10, 14), 1), (301, (13, 18), 1)]
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def session_of(shared_pool, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "chroma.safetensors"
    write_checkpoint(str(path), SMALL_CHROMA, seed=3)

    def make(layout: Layout, **settings) -> Session:
        return Session(shared_pool(layout.ranks), spec_of(path), (layout,), Settings(**settings))

    return make


@pytest.fixture(scope="module")
def expected(session_of):
    """expected(make, *what): what one rank gives, computed once."""
    return functools.cache(lambda make, *what: make(session_of(ONE), *what))


def evaluate(session: Session, text: int, size: tuple[int, int], batch: int, controlled: bool = False) -> torch.Tensor:
    """controlled: with residuals for more tokens than the first rank has."""
    given = inputs(SMALL_CHROMA, text=text, size=size, batch=batch, seed=text)
    residual = functools.partial(randn, batch, 16, SMALL_CHROMA.hidden)
    control = {"input": [residual(seed=1)], "output": [None, residual(seed=2)]} if controlled else None
    prompt = Prompt(given.context, guidance=torch.full((batch,), 2.0))
    return session.evaluate(given.x, given.timestep, prompt, Progress(), control)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_evaluation(session_of, expected, layout):
    for case in (*CASES, (6, (8, 9), 2, True)):
        got = evaluate(session_of(layout), *case)
        assert torch.isfinite(got).all()
        assert relative_difference(got, expected(evaluate, *case)) < TOLERANCE, case


@pytest.mark.parametrize("option", [{"wire": "fp8"}, {"wire": "int8"}, {"linear": "fp8"}], ids=str)
def test_lossy_options(session_of, expected, option):
    got = evaluate(session_of(LAYOUTS[0], **option), *CASES[2])
    assert 1e-5 < relative_difference(got, expected(evaluate, *CASES[2])) < 0.2


def sample(session: Session, cfg: float) -> torch.Tensor:
    positive, negative = (inputs(SMALL_CHROMA, text=n, size=(7, 10), batch=2, seed=n) for n in (35, 6))
    x, mask, image, noise = (randn(2, 16, 7, 10, seed=n) for n in range(4))
    return session.sample(
        x,
        torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0]),
        sampler="heun",
        positive=Prompt(positive.context),
        negative=Prompt(negative.context) if cfg != 1 else None,
        cfg=cfg,
        mask=Inpainting(mask=(mask > 0).float(), latent_image=image, noise=noise),
    )


@pytest.mark.parametrize(
    "layout, cfg",
    [
        pytest.param(layout, cfg, marks=() if cfg == usual else pytest.mark.thorough, id=f"{layout}-{cfg}")
        for layout, usual in ((LAYOUTS[1], 1.0), (LAYOUTS[3], 2.5), (GROUPS[0], 2.5), (GROUPS[1], 1.0))
        for cfg in (1.0, 2.5)
    ],
)
def test_a_loop_with_prompts_of_two_lengths(session_of, expected, layout, cfg):
    one = expected(sample, cfg)
    assert one.shape == (2, 16, 7, 10)
    assert relative_difference(sample(session_of(layout), cfg), one) < TOLERANCE


def test_patches_of_the_approximator(session_of, expected):
    """A LoRA of its layers is its owner's business, and leaves no trace."""
    weights, tensors = {}, {}
    for seed, (name, rows) in enumerate((("layers.3.in_layer", 64), ("out_proj", 512))):
        up, down = randn(rows, 4, seed=seed), randn(4, 64, seed=seed + 9)
        roles = {"up": name_of(up), "down": name_of(down)}
        key = f"distilled_guidance_layer.{name}.weight"
        weights[key] = (WeightPatch(kind="lora", tensors=roles, strength=0.5),)
        tensors |= {roles["up"]: up, roles["down"]: down}

    def patched(session: Session) -> torch.Tensor:
        changed = Session(
            session.pool, session.model, session.layouts, session.settings, WeightPatches(weights, tensors)
        )
        return sample(changed, 2.5)

    plain, one = expected(sample, 2.5), expected(patched)
    assert relative_difference(one, plain) > 1e-2
    two = session_of(LAYOUTS[0])
    assert relative_difference(patched(two), one) < TOLERANCE
    assert relative_difference(sample(two, 2.5), plain) < TOLERANCE
