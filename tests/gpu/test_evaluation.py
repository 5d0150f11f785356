"""Tiny models on one GPU: compiled, captured and replayed evaluations against plain eager ones."""

import pytest
import torch
from support import OneRank, inputs

from fastusp_backend.config import Settings
from fastusp_backend.models.chroma import Chroma
from fastusp_backend.models.flux import Flux
from fastusp_backend.models.flux2 import Flux2
from fastusp_backend.models.qwen_image import QwenImage
from fastusp_backend.models.sd3 import SD3
from fastusp_backend.models.synthetic import (
    TINY_CHROMA,
    TINY_FLUX,
    TINY_FLUX2,
    TINY_QWEN_IMAGE,
    TINY_SD3,
    TINY_Z_IMAGE,
    random_state,
)
from fastusp_backend.models.z_image import ZImage
from fastusp_backend.prompt import Prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def lacks_fp8_products() -> bool:
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9)


PLAIN = {"compile": False, "cuda_graphs": False, "overlap": False}
EAGER = Settings(**PLAIN)


def model_of(family, config):
    with torch.device("meta"):
        model = family(config)
    model.load_state_dict(random_state(model, seed=0, dtype=torch.bfloat16), assign=True)
    return model.cuda().eval()


CONFIGS = [
    (Flux, TINY_FLUX),
    (Flux2, TINY_FLUX2),
    (Chroma, TINY_CHROMA),
    (QwenImage, TINY_QWEN_IMAGE),
    (SD3, TINY_SD3),
    (ZImage, TINY_Z_IMAGE),
]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return model_of(*request.param)


def denoiser(model, settings):
    return OneRank(model, settings, torch.bfloat16, "cuda:0")


def request_of(model, seed, height, width, text):
    given = inputs(model.config, text=text, size=(height, width), seed=seed)
    context, y, guidance = (None if t is None else t.cuda() for t in (given.context, given.y, given.guidance))
    return given.x.cuda(), Prompt(context, y, guidance)


@pytest.mark.parametrize("settings", [Settings(), Settings(compile=False), Settings(cuda_graphs=False)])
def test_options_change_speed_only(model, settings):
    plain, fast = denoiser(model, EAGER), denoiser(model, settings)
    for turn, (height, width, text) in enumerate([(32, 32, 24), (33, 40, 7), (32, 32, 24)] * 3):
        x, prompt = request_of(model, turn, height, width, text)
        t = torch.tensor([0.9 - 0.1 * turn])
        expected, got = plain(x, t, prompt).float(), fast(x, t, prompt).float()
        assert ((got - expected).norm() / expected.norm()).item() < 2e-2, f"turn {turn}"


def test_graphs_that_have_gone_leave_room_for_others(model):
    """As when the buffers of exchanges move, while somebody still holds what the last graph gave."""
    fast = denoiser(model, Settings())
    x, prompt = request_of(model, 0, 32, 32, 24)
    t = torch.tensor([0.5])
    for _ in range(3):
        held = fast(x, t, prompt)
        fast(x, t, prompt)
        fast.evaluations.clear()
        again = fast(x, t, prompt)
        assert torch.equal(fast(x, t, prompt), again) and held.isfinite().all()


def test_the_second_evaluation_of_a_shape_is_captured(model):
    fast = denoiser(model, Settings())
    x, prompt = request_of(model, 0, 32, 32, 24)
    for _ in range(2):
        fast(x, torch.tensor([0.5]), prompt)
    assert [cached.captured for cached in fast.evaluations.values()] == [True]
    for size in (40, 48):
        x, prompt = request_of(model, 0, size, 32, 24)
        for _ in range(2):
            fast(x, torch.tensor([0.5]), prompt)
    assert all(cached.captured for cached in fast.evaluations.values())


def by_rows(model):
    """The same model, held for products in fp8."""
    held = model_of(type(model), model.config)
    for layer in held.products():
        layer.stored = layer.stored.by_rows()
    return held


@pytest.mark.skipif(lacks_fp8_products(), reason="needs a GPU of compute capability 8.9 or newer")
def test_fp8_products_are_those_of_eager(model):
    """A compiled block's bf16 rounds otherwise, so that values on the edge of two codes take the other one: as far from
    exact, but elsewhere. Seen on an H200, all families: 0.6 to 0.77 of the error of 8 bits lies between the two, and
    their errors differ by 3 % at most."""
    held = by_rows(model)
    exact = denoiser(model, EAGER)
    plain, fast = denoiser(held, Settings(**PLAIN, linear="fp8")), denoiser(held, Settings(linear="fp8"))
    for turn in range(3):  # eager, captured, replayed
        x, prompt = request_of(model, turn, 32, 32, 24)
        t = torch.tensor([0.9 - 0.1 * turn])
        without, expected, got = (run(x, t, prompt).float() for run in (exact, plain, fast))
        apart, error, of_eager = (
            (a - b).norm().item() for a, b in ((got, expected), (got, without), (expected, without))
        )
        assert error <= 1.05 * of_eager and apart <= 0.85 * of_eager, f"turn {turn}"
        assert 1e-3 < ((got - without).norm() / without.norm()).item() < 0.15, f"turn {turn}"
