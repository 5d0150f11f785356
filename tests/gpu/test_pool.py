"""A pool on real GPUs: steps that are streamed are right, cancelling is felt, ranks agree."""

import pytest
import torch
from support import SMALL, inputs, relative_difference

from fastusp_backend.config import Layout, ModelSpec, Settings
from fastusp_backend.devices import Devices
from fastusp_backend.errors import Cancelled
from fastusp_backend.models.synthetic import write_flux
from fastusp_backend.pool import Pool, Progress, Prompt, Session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EAGER = Settings(compile=False, cuda_graphs=False, overlap=False)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "flux.safetensors"
    write_flux(str(path), SMALL, dtype=torch.bfloat16)
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


def test_a_cancel_is_felt_and_the_pool_stays(pool, spec):
    sample(pool, spec, ONE)
    pids, seen = pool.status()["pids"], []
    progress = Progress(step=lambda event, _: seen.append(event.index), interrupted=lambda: len(seen) > 3)
    with pytest.raises(Cancelled):
        sample(pool, spec, ONE, steps=5000, progress=progress)
    assert len(seen) < 5000
    sample(pool, spec, ONE)
    assert pool.status()["pids"] == pids


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
