"""Small models, and requests for them, that several tests use."""

import os
from dataclasses import dataclass

import torch

from fastusp_backend.config import ModelSpec
from fastusp_backend.models.flux import FluxConfig
from fastusp_backend.models.qwen_image import QwenImageConfig

SMALL = FluxConfig(
    hidden=512,
    heads=4,
    channels=16,
    context=64,
    pooled=32,
    mlp=1024,
    double_blocks=2,
    single_blocks=2,
    guidance=True,
)
SMALL_QWEN = QwenImageConfig(hidden=512, heads=4, channels=16, context=64, mlp=1024, blocks=2)


def spec_of(path) -> ModelSpec:
    return ModelSpec.of_file(str(path), storage=None, compute="float32")


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Inputs:
    x: torch.Tensor
    timestep: torch.Tensor
    context: torch.Tensor
    y: torch.Tensor | None
    guidance: torch.Tensor | None


def inputs(
    config: FluxConfig | QwenImageConfig, *, text: int, size: tuple[int, int], batch: int = 1, seed: int = 0
) -> Inputs:
    flux = isinstance(config, FluxConfig)
    return Inputs(
        x=randn(batch, config.channels, *size, seed=seed),
        timestep=torch.linspace(0.7, 0.3, batch) if batch > 1 else torch.tensor([0.7]),
        context=randn(batch, text, config.context, seed=seed + 1),
        y=randn(batch, config.pooled, seed=seed + 2) if flux else None,
        guidance=torch.full((batch,), 3.5) if flux else None,
    )


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
