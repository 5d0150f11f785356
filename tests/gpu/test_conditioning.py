"""References, further channels and ControlNet residuals on one GPU: compiled, captured and replayed evaluations against
plain eager ones."""

from dataclasses import replace

import pytest
import torch
from support import OneRank

from fastusp_backend.config import Settings
from fastusp_backend.models.family import NO_RESIDUALS, Residuals
from fastusp_backend.models.synthetic import (
    TINY_CHROMA,
    TINY_FLUX,
    TINY_FLUX2,
    TINY_QWEN_IMAGE,
    TINY_SD3,
    TINY_Z_IMAGE,
    random_state,
)
from fastusp_backend.prompt import Prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EAGER = Settings(compile=False, cuda_graphs=False, overlap=False)
CONFIGS = {
    "flux": TINY_FLUX,
    "fill": replace(TINY_FLUX, concat_channels=80),
    "flux2": TINY_FLUX2,
    "qwen": TINY_QWEN_IMAGE,
    "sd3": TINY_SD3,
    "chroma": TINY_CHROMA,
    "z_image": TINY_Z_IMAGE,
}


def denoisers(family: str, *settings: Settings) -> list[OneRank]:
    with torch.device("meta"):
        model = CONFIGS[family].build()
    model.load_state_dict(random_state(model, seed=0, dtype=torch.bfloat16), assign=True)
    model = model.cuda().eval()
    return [OneRank(model, options, torch.bfloat16, "cuda:0") for options in settings]


def prompt(family: str, randn, references: int, method: str | None) -> Prompt:
    config = CONFIGS[family]
    return replace(
        config.example_prompt(randn, text=24, size=(32, 30)),
        references=tuple(randn(1, config.channels, 20 + 6 * n, 17) for n in range(references)),
        reference_method=method,
    )


@pytest.mark.parametrize("settings", [Settings(), Settings(compile=False), Settings(cuda_graphs=False)], ids=str)
@pytest.mark.parametrize(
    "family, references, method, controlled",
    [
        ("flux", 2, "uxo", False),
        ("flux", 1, None, True),
        ("fill", 0, None, False),
        ("flux2", 2, None, True),
        ("flux2", 2, "index_timestep_zero", False),
        ("qwen", 2, "index", True),
        ("qwen", 2, "index_timestep_zero", False),
        ("sd3", 0, None, True),
        ("chroma", 0, None, True),
        ("z_image", 0, None, False),
    ],
)
def test_options_change_speed_only(family, references, method, controlled, settings):
    plain, fast = denoisers(family, EAGER, settings)
    generator = torch.Generator("cuda").manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    config, given = CONFIGS[family], prompt(family, randn, references, method)
    for turn in range(4):
        x, timestep = randn(1, config.channels, 16 * config.patch, 15 * config.patch), torch.tensor([0.9 - 0.2 * turn])
        control = NO_RESIDUALS
        if controlled:
            residuals = (randn(1, n, config.hidden).bfloat16() for n in (240, 100))
            control = Residuals(tuple(residuals), (0, None, 1), (1,))
        expected, got = (d(x, timestep, given, control).float() for d in (plain, fast))
        assert ((got - expected).norm() / expected.norm()).item() < 2e-2, f"turn {turn}"
    assert all(cached.captured == settings.cuda_graphs for cached in fast.evaluations.values())
