"""Every layout gives one rank's result: single evaluations over lengths and sizes, and whole sampling loops."""

import pytest
import torch
from support import SMALL, inputs, randn, relative_difference, spec_of

from fastusp_backend.config import Layout, Settings
from fastusp_backend.pool import Progress
from fastusp_backend.pool.session import Session
from fastusp_backend.prompt import Inpainting, Prompt
from fastusp_backend.sampling import SAMPLERS

pytestmark = pytest.mark.dist

LAYOUTS = [(1, 1), (2, 1), (1, 2), (1, 3), (2, 2), (4, 1), pytest.param(1, 4, marks=pytest.mark.thorough)]
TEXTS = (1, 7, 24, 97, 130)
# 1, 6, 20, 63 and 96 image tokens: odd sizes, fewer tokens than ranks, and counts that no number of ranks divides.
SIZES = [((2, 2), 1), ((3, 5), 2), ((10, 7), 1), ((14, 18), 2), ((24, 16), 1)]
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def session_of(shared_pool, dev):
    def make(ulysses: int, ring: int, model=dev, **settings) -> Session:
        layout = Layout(ulysses=ulysses, ring=ring)
        return Session(shared_pool(layout.ranks), spec_of(model), (layout,), Settings(**settings))

    return make


def evaluate(session: Session, given) -> torch.Tensor:
    return session.evaluate(given.x, given.timestep, Prompt(given.context, given.y, given.guidance), Progress())


@pytest.fixture(scope="module")
def reference(session_of):
    """One rank's answers with the plain attention, each computed once."""
    known = {}

    def of(text, size, batch):
        key = text, size, batch
        if key not in known:
            given = inputs(SMALL, text=text, size=size, batch=batch, seed=text)
            known[key] = given, evaluate(session_of(1, 1, attention="math"), given)
        return known[key]

    return of


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("ulysses, ring", LAYOUTS)
def test_an_evaluation(session_of, reference, ulysses, ring, text):
    """Each layout with all lengths and all sizes; each length and size together, with one layout or two."""
    turn = ulysses + 2 * ring  # which takes all values, of the remainders by five
    size, batch = SIZES[(TEXTS.index(text) + turn) % len(SIZES)]
    given, expected = reference(text, size, batch)
    got = evaluate(session_of(ulysses, ring), given)
    assert got.dtype == torch.float32 and torch.isfinite(got).all()
    assert relative_difference(got, expected) < TOLERANCE, (size, batch)


@pytest.mark.parametrize("ulysses, ring", [(2, 1), (1, 2)])
@pytest.mark.parametrize("attention", ["math", "flash"])
def test_attention_back_ends(session_of, reference, ulysses, ring, attention):
    given, expected = reference(24, (10, 7), 1)
    got = evaluate(session_of(ulysses, ring, attention=attention), given)
    assert relative_difference(got, expected) < TOLERANCE


@pytest.mark.parametrize("ulysses, ring", [(2, 1), (1, 3), (2, 2)])
def test_without_overlap(session_of, reference, ulysses, ring):
    given, expected = reference(24, (10, 7), 1)
    assert relative_difference(evaluate(session_of(ulysses, ring, overlap=False), given), expected) < TOLERANCE


@pytest.mark.parametrize("ring", [2, 3])
def test_without_pipelining_the_ring_the_bits_are_the_same(session_of, reference, ring):
    given, _ = reference(24, (10, 7), 1)
    pipelined, awaited = (evaluate(session_of(1, ring, ring_pipeline=on), given) for on in (True, False))
    assert torch.equal(pipelined, awaited)


@pytest.mark.parametrize(
    "wire, bound, ulysses, ring",
    [
        ("fp8", 0.05, 2, 1),
        ("fp8", 0.05, 1, 3),
        ("int8", 0.015, 1, 2),
        ("int8", 0.015, 2, 2),
        pytest.param("int8", 0.015, 2, 1, marks=pytest.mark.thorough),
        pytest.param("int8", 0.015, 1, 3, marks=pytest.mark.thorough),
        pytest.param("fp8", 0.05, 1, 2, marks=pytest.mark.thorough),
        pytest.param("fp8", 0.05, 2, 2, marks=pytest.mark.thorough),
    ],
)
def test_a_wire_of_8_bits_is_close_and_in_use(session_of, reference, ulysses, ring, wire, bound):
    """Uneven lengths, a batch; with few tokens and random weights the error is larger than a real image's."""
    for text, size, batch in ((7, (3, 5), 2), (130, (14, 18), 1)):
        given, expected = reference(text, size, batch)
        got = evaluate(session_of(ulysses, ring, wire=wire), given)
        assert TOLERANCE < relative_difference(got, expected) < bound
        late = evaluate(session_of(ulysses, ring, wire=wire, overlap=False, ring_pipeline=False), given)
        assert relative_difference(late, got) < TOLERANCE


def test_the_comparison_would_notice_a_missing_token(session_of, reference):
    given, expected = reference(130, (14, 18), 2)
    less = Prompt(given.context[:, 1:], given.y, given.guidance)
    got = session_of(2, 1).evaluate(given.x, given.timestep, less, Progress())
    assert relative_difference(got, expected) > 10 * TOLERANCE


def test_schnell(session_of, schnell):
    given = inputs(SMALL, text=24, size=(8, 7))
    prompt = Prompt(given.context, given.y)
    one, two = (
        s.evaluate(given.x, given.timestep, prompt, Progress())
        for s in (session_of(1, 1, schnell), session_of(1, 2, schnell))
    )
    assert relative_difference(two, one) < TOLERANCE


SIGMAS = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
SIZE = (10, 7)


def sample(session: Session, name: str, *, masked: bool = False, cfg: float = 1.0, batch: int = 2, steps=None):
    given, other = (inputs(SMALL, text=n, size=SIZE, batch=batch, seed=n) for n in (24, 7))
    draws = SAMPLERS[name].noise_draws(SIGMAS, {})
    mask = None
    if masked:
        ones = (randn(1, 1, *SIZE, seed=30) > 0).float().expand(batch, 16, *SIZE)
        mask = Inpainting(
            mask=ones, latent_image=randn(batch, 16, *SIZE, seed=31), noise=randn(batch, 16, *SIZE, seed=32)
        )
    result = session.sample(
        given.x,
        SIGMAS,
        sampler=name,
        positive=Prompt(given.context, given.y, given.guidance),
        negative=Prompt(other.context, other.y, other.guidance) if cfg != 1.0 else None,
        cfg=cfg,
        noise=randn(draws, batch, 16, *SIZE, seed=33) if draws else None,
        mask=mask,
        progress=Progress(step=lambda event, tensors: steps.append((event, tensors)) if steps is not None else None),
    )
    return result, mask


@pytest.mark.parametrize(
    "name, masked, cfg",
    [
        pytest.param(name, masked, cfg, marks=[pytest.mark.thorough] if masked == (number % 4 > 1) else [])
        for number, name in enumerate(SAMPLERS)
        for masked, cfg in zip((False, True), (1.0, 3.0) if number % 2 else (3.0, 1.0), strict=True)
    ],
)
def test_a_sampling_loop(session_of, name, masked, cfg):
    """Every sampler, with a mask or without one, with guidance or without it: all four of these together."""
    one, mask = sample(session_of(1, 1), name, masked=masked, cfg=cfg)
    two, _ = sample(session_of(2, 1), name, masked=masked, cfg=cfg)
    assert relative_difference(two, one) < TOLERANCE
    if mask:
        kept = mask.mask == 0
        torch.testing.assert_close(two[kept], mask.latent_image[kept], rtol=0, atol=1e-5)


def test_a_sampling_loop_on_other_layouts(session_of):
    one, _ = sample(session_of(1, 1), "heun", cfg=3.0)
    for layout in ((1, 2), (2, 2), (1, 3)):
        more, _ = sample(session_of(*layout), "heun", cfg=3.0)
        assert relative_difference(more, one) < TOLERANCE, layout


def test_guidance_and_masks_matter(session_of):
    session = session_of(2, 1)
    results = [sample(session, "euler", masked=masked, cfg=cfg)[0] for masked in (False, True) for cfg in (1.0, 3.0)]
    for i, result in enumerate(results):
        assert all(relative_difference(result, other) > 0.01 for other in results[:i])


def test_the_remote_loop_is_the_local_loop_over_remote_evaluations(session_of):
    """The steps that are streamed are those of Euler's method on `evaluate`."""
    session, steps = session_of(2, 1), []
    result, _ = sample(session, "euler", batch=1, steps=steps)
    given = inputs(SMALL, text=24, size=SIZE, seed=24)
    prompt, x = Prompt(given.context, given.y, given.guidance), given.x
    assert [event.index for event, _ in steps] == [0, 1, 2, 3]
    for (event, tensors), sigma, following in zip(steps, SIGMAS[:-1], SIGMAS[1:], strict=True):
        assert event.total == 4 and event.sigma == pytest.approx(float(sigma)) and event.seconds > 0
        velocity = session.evaluate(x, sigma[None], prompt, Progress())
        assert relative_difference(tensors["x"], x) < TOLERANCE
        assert relative_difference(tensors["denoised"], x - sigma * velocity) < TOLERANCE
        x = x + (following - sigma) * velocity
    assert relative_difference(result, x) < TOLERANCE


def test_fp8_products_are_close_whatever_the_ranks_and_leave_no_trace(session_of, reference):
    given, expected = reference(24, (10, 7), 1)
    before = evaluate(session_of(2, 1), given)
    one, two, ring = (evaluate(session_of(*degrees, linear="fp8"), given) for degrees in ((1, 1), (2, 1), (1, 2)))
    lost = relative_difference(one, expected)
    assert 1e-3 < lost < 0.1
    for more in (two, ring):  # other sums round to other codes here and there
        assert relative_difference(more, one) < lost and relative_difference(more, expected) < 0.1
    assert torch.equal(evaluate(session_of(2, 1), given), before)
