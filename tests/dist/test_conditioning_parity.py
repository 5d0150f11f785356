"""Reference latents, further input channels and ControlNet residuals: every layout gives one rank's result."""

import functools
from dataclasses import replace

import pytest
import torch
from support import SMALL, SMALL_FLUX2, SMALL_QWEN, inputs, randn, relative_difference, spec_of

from fastusp_backend.config import Layout, Settings
from fastusp_backend.errors import RequestError
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import Progress
from fastusp_backend.pool.session import Session
from fastusp_backend.prompt import Prompt

pytestmark = pytest.mark.dist

ONE = Layout(ulysses=1, ring=1)
LAYOUTS = [
    Layout(ulysses=2, ring=1),
    Layout(ulysses=1, ring=3),
    Layout(ulysses=2, ring=2),
    Layout(batch=2, ulysses=2, ring=1),
]
TOLERANCE = 2e-5
SIZE, BATCH = (7, 10), 2
REFERENCES = ((5, 3), (8, 7), (2, 2))
"""6, 16 and 1 tokens behind the image's 20 (FLUX.2: 15, 56 and 4 behind 70): on four ranks the border lies inside a
rank's part."""
FAMILIES = {"flux": SMALL, "fill": replace(SMALL, concat_channels=80), "flux2": SMALL_FLUX2, "qwen": SMALL_QWEN}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditioning")
    for name, config in FAMILIES.items():
        write_checkpoint(str(folder / name), config, seed=4)
    return folder


@pytest.fixture(scope="module")
def session_of(shared_pool, files):
    def make(family: str, layout: Layout) -> Session:
        return Session(shared_pool(layout.ranks), spec_of(files / family), (layout,), Settings())

    return make


def given(family: str, *, text: int = 7, seed: int = 0, references: int = 0, method: str | None = None):
    """x, its timesteps and a prompt."""
    config = FAMILIES[family]
    made = inputs(config, text=text, size=SIZE, batch=BATCH, seed=seed)
    channels = config.concat_channels
    prompt = Prompt(
        made.context,
        made.y,
        made.guidance,
        randn(BATCH, channels, *SIZE, seed=seed + 5) if channels else None,
        tuple(randn(BATCH, config.channels, *size, seed=seed + n) for n, size in enumerate(REFERENCES[:references])),
        method,
    )
    return made.x, made.timestep, prompt


def evaluate(session: Session, x, timestep, prompt: Prompt, control=None) -> torch.Tensor:
    for _ in range(2):  # the second time the workers hold the prompt
        velocity = session.evaluate(x, timestep, prompt, Progress(), control)
    return velocity


CASES = [
    ("flux", 1, None),
    ("flux", 2, "index"),
    ("flux", 3, "uxo"),
    ("fill", 0, None),
    ("flux2", 3, None),
    ("flux2", 2, "index_timestep_zero"),
    ("qwen", 3, None),
    ("qwen", 2, "negative_index"),
    ("qwen", 3, "index_timestep_zero"),
]


@pytest.fixture(scope="module")
def expected(session_of):
    """expected(make, family, *what): what one rank gives, computed once."""
    return functools.cache(lambda make, family, *what: make(session_of(family, ONE), family, *what))


def referring(session: Session, family: str, references: int, method: str | None) -> torch.Tensor:
    return evaluate(session, *given(family, references=references, method=method))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_evaluation(session_of, expected, layout):
    """Each layout has every second case, each case two layouts: one of two ranks or three, and one of four."""
    for case in CASES[LAYOUTS.index(layout) % 2 :: 2]:
        family, *_ = case
        got = referring(session_of(family, layout), *case)
        assert got.shape == given(family)[0].shape
        assert relative_difference(got, expected(referring, *case)) < TOLERANCE, case
    zero, index = (expected(referring, "qwen", 3, method) for method in ("index_timestep_zero", None))
    assert relative_difference(zero, index) > 100 * TOLERANCE


def controls(family: str) -> list[dict]:
    """A residual of its own for each image, one for all, and one for the first tokens alone."""
    hidden = FAMILIES[family].hidden
    own, shared, part = randn(BATCH, 20, hidden, seed=1), randn(1, 20, hidden, seed=2), randn(1, 9, hidden, seed=3)
    if family == "qwen":
        return [{"input": [own, shared]}, {"input": [None, part, own]}, {"input": [own]}]
    return [
        {"input": [own, shared]},
        {"input": [None, part, own], "output": [shared, shared]},
        {"input": [], "output": [None, own]},
    ]


def controlled(session: Session, family: str, number: int) -> torch.Tensor:
    return evaluate(session, *given(family, references=1), controls(family)[number])


def turns(families: dict[str, tuple[int, ...]]) -> list:
    """Families with all layouts, of which those that are not numbered are further variants."""
    return [
        pytest.param(family, layout, id=f"{family}-{layout}", marks=() if n in shown else pytest.mark.thorough)
        for family, shown in families.items()
        for n, layout in enumerate(LAYOUTS)
    ]


@pytest.mark.parametrize("family, layout", turns({"flux": (1, 2), "qwen": (0, 3)}))
def test_control(session_of, expected, layout, family):
    session = session_of(family, layout)
    results = [controlled(session, family, number) for number in range(3)]
    for number, got in enumerate(results):
        assert relative_difference(got, expected(controlled, family, number)) < TOLERANCE
    plain = evaluate(session, *given(family, references=1))  # behind them: nothing of them is left
    assert all(relative_difference(got, plain) > 100 * TOLERANCE for got in results)


METHODS = dict.fromkeys(("flux2", "qwen"), "index_timestep_zero")


def guided(session: Session, family: str) -> torch.Tensor:
    """Positive and negative prompt differ in length and, where the model takes any, in their references."""
    many = 0 if family == "fill" else 2
    x, _, positive = given(family, text=9, references=many, method=METHODS.get(family, "uxo"))
    _, _, negative = given(family, text=6, seed=20, references=many // 2, method="index" if many else None)
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0])
    return session.sample(x, sigmas, sampler="heun", positive=positive, negative=negative, cfg=2.5, progress=Progress())


@pytest.mark.parametrize("family, layout", turns({"flux": (2,), "fill": (0,), "flux2": (0, 3), "qwen": (2,)}))
def test_a_guided_loop(session_of, expected, layout, family):
    assert relative_difference(guided(session_of(family, layout), family), expected(guided, family)) < TOLERANCE


def test_what_does_not_fit_is_refused_and_the_next_request_runs(session_of):
    session = session_of("flux", LAYOUTS[0])
    x, timestep, prompt = given("flux", references=1)
    with pytest.raises(RequestError, match="a reference latent"):
        evaluate(session, x, timestep, replace(prompt, references=(torch.ones(BATCH, 4, 2, 2),)))
    with pytest.raises(RequestError, match="choose a ControlNet that was made for this model"):
        evaluate(session, x, timestep, prompt, {"input": [torch.ones(1, 20, 64)]})
    with pytest.raises(RequestError, match="takes 80 channels of an image or mask beside the latents; got none"):
        evaluate(session_of("fill", LAYOUTS[0]), x, timestep, replace(prompt, references=()))
    assert torch.isfinite(evaluate(session, x, timestep, prompt)).all()
