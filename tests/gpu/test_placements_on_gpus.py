"""Weights that travel between GPUs, or from the host's memory, give the bits of weights that stay; graphs, patches
and parking included."""

from dataclasses import replace

import pytest
import torch
from support import SMALL, inputs, randn

from fastusp_backend.config import Layout, ModelSpec, Settings, WeightPatch
from fastusp_backend.devices import Devices
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import NO_PATCHES, Pool, Session, WeightPatches, name_of
from fastusp_backend.prompt import Prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ONE = Layout(ulysses=1, ring=1)
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "flux.safetensors"
    write_checkpoint(str(path), replace(SMALL, double_blocks=3, single_blocks=4), dtype=torch.bfloat16)
    return ModelSpec.of_file(str(path), storage=None, compute="bfloat16")


@pytest.fixture(scope="module")
def one():
    pool = Pool(Devices(ranks=1, gpus=(0,)))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def two():
    pool = Pool(Devices(ranks=2, gpus=(0, 1)))
    yield pool
    pool.close()


def lora() -> WeightPatches:
    up, down = randn(1536, 4, seed=1) * 0.05, randn(4, 512, seed=2)
    patch = WeightPatch(kind="lora", tensors={"up": name_of(up), "down": name_of(down)}, strength=0.8, alpha=4.0)
    return WeightPatches({"double_blocks.0.img_attn.qkv.weight": (patch,)}, {name_of(up): up, name_of(down): down})


def sampled(pool, spec, layout, patches=NO_PATCHES, *, cfg=1.0, **settings) -> torch.Tensor:
    given = inputs(SMALL, text=24, size=(16, 12), seed=3)
    over = Session(pool, spec, (layout,), Settings(**settings), patches=patches)
    prompt = Prompt(given.context, given.y, given.guidance)
    other = Prompt(given.context * 0.5, given.y, given.guidance) if cfg != 1.0 else None
    sigmas = torch.linspace(1, 0, 7)
    return over.sample(given.x, sigmas, sampler="euler", positive=prompt, negative=other, cfg=cfg)


def check(pool, spec, layout, choices, **how) -> None:
    turns = (NO_PATCHES, lora(), NO_PATCHES)
    expected = [sampled(pool, spec, layout, patches, weights="whole", **how) for patches in turns]
    assert not torch.equal(expected[0], expected[1])
    for weights in choices:
        for patches, right in zip(turns, expected, strict=True):
            assert torch.equal(sampled(pool, spec, layout, patches, weights=weights, **how), right), weights
        pool.park()
        assert torch.equal(sampled(pool, spec, layout, weights=weights, **how), expected[0]), weights
        assert "blocks stay" in pool.status()["weights"]


@pytest.mark.parametrize("how", [{}, {"cuda_graphs": False}, {"linear": "fp8"}], ids=str)
def test_one_gpu(one, spec, how):
    if how.get("linear") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU of compute capability 8.9 or newer")
    check(one, spec, ONE, ["host"], **how)


@needs_two
@pytest.mark.parametrize(
    "layout, how",
    [
        (Layout(ulysses=2, ring=1), {}),
        (Layout(ulysses=1, ring=2), {}),
        (Layout(ulysses=1, ring=1, batch=2), {"cfg": 3.0}),
        (Layout(ulysses=2, ring=1), {"overlap": False}),
    ],
    ids=str,
)
def test_two_gpus(two, spec, layout, how):
    check(two, spec, layout, ["shared", "host"], **how)


@needs_two
def test_without_peer_access_they_come_from_the_host(spec, monkeypatch):
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    pool = Pool(Devices(ranks=2, gpus=(0, 1)))
    try:
        check(pool, spec, Layout(ulysses=2, ring=1), ["host"])
        with pytest.raises(Exception, match="Set weights to host or auto: .* do not reach each other"):
            sampled(pool, spec, Layout(ulysses=2, ring=1), weights="shared")
    finally:
        pool.close()
