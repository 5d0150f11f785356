"""A pool on real GPUs: steps that are streamed are right, cancelling is felt, ranks agree."""

import pytest
import torch
from support import SMALL, inputs, relative_difference

from fastusp_backend.config import Layout, ModelSpec, Settings
from fastusp_backend.devices import Devices
from fastusp_backend.errors import Cancelled
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import Pool, Progress, Session
from fastusp_backend.prompt import Prompt
from fastusp_backend.protocol import channel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EAGER = Settings(compile=False, cuda_graphs=False, overlap=False)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "flux.safetensors"
    write_checkpoint(str(path), SMALL, dtype=torch.bfloat16)
    return ModelSpec.of_file(str(path), storage=None, compute="bfloat16")


@pytest.fixture(scope="module")
def pool():
    pool = Pool(Devices(ranks=1, gpus=(0,)))
    yield pool
    pool.close()


def sample(pool: Pool, spec, layout: Layout, settings=Settings(), steps: int = 6, progress=None) -> torch.Tensor:  # noqa: B008
    given = inputs(SMALL, text=24, size=(16, 12), seed=3)
    return Session(pool, spec, (layout,), settings).sample(
        given.x,
        torch.linspace(1, 0, steps + 1),
        sampler="euler",
        positive=Prompt(given.context, given.y, given.guidance),
        progress=progress or Progress(),
    )


ONE = Layout(ulysses=1, ring=1)


def streamed(pool, spec, settings):
    seen = []
    result = sample(pool, spec, ONE, settings, progress=Progress(step=lambda event, tensors: seen.append(tensors)))
    return seen, result


def test_streamed_steps_equal_eager_ones(pool, spec):
    (fast, result), (plain, expected) = streamed(pool, spec, Settings()), streamed(pool, spec, EAGER)
    assert len(fast) == len(plain) == 6
    for got, wanted in zip(fast, plain, strict=True):
        assert relative_difference(got["x"], wanted["x"]) < 0.05
        assert relative_difference(got["denoised"], wanted["denoised"]) < 0.05
    assert relative_difference(result, expected) < 0.05


def test_a_shape_s_first_evaluation_is_told_as_compiling(pool, spec):
    """Once for a shape: else its seconds would count as loading."""
    phases = [[], []]
    for seen in phases:
        sample(pool, spec, ONE, Settings(compile=False), progress=Progress(phase=seen.append))
    assert phases[0][-1] == "compiling" and "compiling" not in phases[1]


def test_a_cancel_is_felt_and_the_pool_stays(pool, spec):
    sample(pool, spec, ONE)
    pids, seen = pool.status()["pids"], []
    progress = Progress(step=lambda event, _: seen.append(event.index), interrupted=lambda: len(seen) > 3)
    with pytest.raises(Cancelled):
        sample(pool, spec, ONE, steps=5000, progress=progress)
    assert len(seen) < 5000
    sample(pool, spec, ONE)
    assert pool.status()["pids"] == pids


def controlled(pool: Pool, spec, layout: Layout, residuals: torch.Tensor, settings: Settings) -> torch.Tensor:
    """One evaluation with a ControlNet's residuals: (3, tokens, hidden)."""
    given, (one, two, three) = inputs(SMALL, text=24, size=(62, 66), seed=3), residuals.split(1)
    session = Session(pool, spec, (layout,), settings)
    prompt = Prompt(given.context, given.y, given.guidance)
    return session.evaluate(given.x, given.timestep, prompt, Progress(), {"input": [one, two], "output": [None, three]})


def held_against_inline(pool: Pool, spec, layout: Layout, monkeypatch) -> None:
    """What travels through pinned memory, evaluation after evaluation, arrives as what travels inside messages does."""
    sent = [torch.randn(3, 31 * 33, SMALL.hidden, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    got = [controlled(pool, spec, layout, t.cuda(), Settings()) for t in (*sent, *sent)]
    lasting = pool._workers.channel._lasting
    assert lasting.bytes.is_pinned()
    with monkeypatch.context() as patch:
        patch.setattr(channel, "INLINE_LIMIT", 1 << 40)
        expected = [controlled(pool, spec, layout, t, Settings()) for t in sent]
    for n, velocity in enumerate(got):
        assert relative_difference(velocity, expected[n % 4]) < 1e-3
    assert relative_difference(expected[0], expected[1]) > 0.05
    pool.release()
    assert not lasting.bytes.is_pinned()


def test_control_through_pinned_memory(pool, spec, monkeypatch):
    held_against_inline(pool, spec, ONE, monkeypatch)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_control_on_two_gpus(spec, monkeypatch):
    two = Pool(Devices(ranks=2, gpus=(0, 1)))
    try:
        held_against_inline(two, spec, Layout(ulysses=2, ring=1), monkeypatch)
    finally:
        two.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("layout", [Layout(ulysses=2, ring=1), Layout(ulysses=1, ring=2)], ids=str)
@pytest.mark.parametrize(
    "settings", [Settings(), Settings(overlap=False), EAGER], ids=["default", "no overlap", "eager"]
)
def test_two_gpus_give_ones_result(pool, spec, layout, settings):
    two = Pool(Devices(ranks=2, gpus=(0, 1)))
    try:
        got = sample(two, spec, layout, settings)
    finally:
        two.close()
    assert relative_difference(got, sample(pool, spec, ONE, EAGER)) < 0.05
