"""Weights leave the GPU, its memory with them, and come back; what does not fit is refused before it is tried."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from formats import write
from support import SMALL, inputs, relative_difference
from test_pool import ONE, sample, spec  # noqa: F401 - spec is a fixture

from fastusp_backend.config import ModelSpec, Settings
from fastusp_backend.devices import Devices
from fastusp_backend.engine import Engine
from fastusp_backend.engine.denoiser import WORKING_SET
from fastusp_backend.errors import RequestError
from fastusp_backend.models.files import read_model, storage_plans
from fastusp_backend.models.ownership import Ownership
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import Pool, Progress, Session
from fastusp_backend.prompt import Prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def evaluated(engine: Engine) -> torch.Tensor:
    given = inputs(SMALL, text=24, size=(32, 32), seed=3)
    denoiser = engine.denoiser(ONE, Settings())
    prompt = Prompt(given.context.cuda(), given.y.cuda(), given.guidance.cuda())
    denoiser.probe_memory(given.x.cuda(), [prompt])
    for _ in range(3):  # eager, captured, replayed
        (output,) = denoiser(given.x.cuda(), given.timestep, [prompt], lambda: None)
    return output.cpu()


@contextlib.contextmanager
def all_but(nbytes: int) -> Iterator[None]:
    """Has the rest of what is free of the GPU taken. It is given back where a test fails, too, whose frames stay."""
    torch.cuda.empty_cache()
    hog = torch.empty(torch.cuda.mem_get_info()[0] - nbytes, dtype=torch.uint8, device="cuda")
    try:
        yield
    finally:
        hog.untyped_storage().resize_(0)
        torch.cuda.empty_cache()


def test_a_parked_model_leaves_nothing_and_comes_back_uncompiled(spec):  # noqa: F811
    torch.cuda.empty_cache()
    empty = torch.cuda.memory_reserved()
    engine = Engine(torch.device("cuda", 0))
    engine.describe(spec)
    engine.make_room()
    engine.load()
    before = evaluated(engine)
    for _ in range(2):
        engine.park()
        assert torch.cuda.memory_reserved() <= empty + 2**25 and engine.nbytes >= spec.file.size * 0.99
        engine.reserve()
        engine.fetch()
        assert torch.equal(evaluated(engine), before)
    engine.release()
    assert torch.cuda.memory_reserved() <= empty + 2**25


def test_an_evaluation_that_does_not_fit_is_refused_and_the_next_prompt_runs(spec):  # noqa: F811
    pool = Pool(Devices(ranks=1, gpus=(0,)))
    try:
        sample(pool, spec, ONE)
        pids, large = pool.status()["pids"], inputs(SMALL, text=24, size=(1024, 1024))
        refused = pytest.raises(RequestError, match=r"rank 0 \(NVIDIA.* ran out of memory .* it asked for .* were free")
        with all_but(2**31), refused:
            Session(pool, spec, (ONE,), Settings()).evaluate(
                large.x, large.timestep, Prompt(large.context, large.y, large.guidance), Progress()
            )
        sample(pool, spec, ONE)
        assert pool.status()["pids"] == pids
    finally:
        pool.close()


def test_unpacked_weights_give_way_to_an_image_that_lacks_their_room(tmp_path):
    """It is evaluated with weights as the file has them, and is the image that unpacked ones give."""
    config = replace(SMALL, hidden=1536, heads=12, mlp=6144, double_blocks=4, single_blocks=8)
    write_checkpoint(str(tmp_path / "plain"), config, dtype=torch.bfloat16)
    write("gguf_Q8_0", tmp_path / "plain", tmp_path / "model.gguf")
    packed = ModelSpec.of_file(str(tmp_path / "model.gguf"), storage=None, compute="bfloat16", keep_quantised=True)

    def evaluate(pool: Pool, *size: int) -> torch.Tensor:
        given = inputs(config, text=24, size=size)
        prompt = Prompt(given.context, given.y, given.guidance)
        return Session(pool, packed, (ONE,), Settings()).evaluate(given.x, given.timestep, prompt, Progress())

    large = 448, 448
    pool = Pool(Devices(ranks=1, gpus=(0,)))
    try:
        evaluate(pool, 16, 16)
        assert pool.held.unpacked
        gained = pool.held.nbytes - packed.file.size
        needed = WORKING_SET * (24 + large[0] * large[1] // 4) * config.hidden * torch.bfloat16.itemsize
        pids = pool.status()["pids"]
        with all_but(needed - gained // 2):  # half of what unpacking took is lacking
            small = evaluate(pool, *large)
        assert pool.crowded and not pool.held.unpacked and pool.status()["pids"] == pids
        assert 0.95 < pool.held.nbytes / packed.file.size < 1.05  # whole
    finally:
        pool.close()
    pool = Pool(Devices(ranks=1, gpus=(0,)))
    try:
        wide = evaluate(pool, *large)
        assert pool.held.unpacked
        assert relative_difference(small, wide) < 0.02
    finally:
        pool.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_keep_half_each(spec):  # noqa: F811
    """Of what both hold; each keeps its own modulations, whose layers are whole."""
    file = read_model(spec.path)
    plans = storage_plans(file.model, file.header, spec)
    ownership = Ownership(file.model, plans, 2)
    shared = sum(plan.info.size for name, plan in plans.items() if ownership.owner(name) is None)
    parked = max(ownership.nbytes) - shared // 2
    pool, layout = Pool(Devices(ranks=2, gpus=(0, 1))), ONE.__class__(ulysses=2, ring=1)
    try:
        before = sample(pool, spec, layout)
        assert pool.held.nbytes == max(ownership.nbytes) < 0.9 * spec.file.size
        for _ in range(2):
            pool.park()
            assert pool.held.state == "parked"
            assert 0 <= pool.held.nbytes - parked < 64 << 10  # what is moved begins at aligned places
            assert torch.equal(sample(pool, spec, layout), before)
    finally:
        pool.close()
