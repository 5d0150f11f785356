"""A tiny FLUX on one GPU: compiled, captured and replayed evaluations against plain eager ones."""

import pytest
import torch
from support import OneRank

from fastusp_backend.config import Settings
from fastusp_backend.models.family import Conditioning
from fastusp_backend.models.flux import Flux
from fastusp_backend.models.synthetic import TINY_FLUX, random_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EAGER = Settings(compile=False, cuda_graphs=False, overlap=False)


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        model = Flux(TINY_FLUX)
    model.load_state_dict(random_state(model, seed=0, dtype=torch.bfloat16), assign=True)
    return model.cuda().eval()


def denoiser(model, settings):
    return OneRank(model, settings, torch.bfloat16, "cuda:0")


def inputs(seed, height, width, text):
    generator = torch.Generator("cuda").manual_seed(seed)
    like = {"device": "cuda", "generator": generator}
    prompt = Conditioning(
        torch.randn(1, text, TINY_FLUX.context, **like),
        torch.randn(1, TINY_FLUX.pooled, **like),
        torch.full((1,), 3.5, device="cuda"),
    )
    return torch.randn(1, 16, height, width, **like), prompt


@pytest.mark.parametrize("settings", [Settings(), Settings(compile=False), Settings(cuda_graphs=False)])
def test_options_change_speed_only(model, settings):
    plain, fast = denoiser(model, EAGER), denoiser(model, settings)
    for turn, (height, width, text) in enumerate([(32, 32, 24), (33, 40, 7), (32, 32, 24)] * 3):
        x, prompt = inputs(turn, height, width, text)
        t = torch.tensor([0.9 - 0.1 * turn])
        expected, got = plain(x, t, prompt).float(), fast(x, t, prompt).float()
        assert ((got - expected).norm() / expected.norm()).item() < 2e-2, f"turn {turn}"


def test_the_second_evaluation_of_a_shape_is_captured_and_a_new_shape_compiles_nothing(model):
    fast = denoiser(model, Settings())
    x, prompt = inputs(0, 32, 32, 24)
    for _ in range(2):
        fast(x, torch.tensor([0.5]), prompt)
    assert [step.captured for step in fast.steps.values()] == [True]
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for size in (40, 48):
        x, prompt = inputs(0, size, 32, 24)
        for _ in range(2):
            fast(x, torch.tensor([0.5]), prompt)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert all(step.captured for step in fast.steps.values())
