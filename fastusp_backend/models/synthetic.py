"""Random checkpoints in the true key layout, for the demo, tests and benchmarks: shapes and speed are real, images
are not."""

from dataclasses import replace
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from .chroma import ChromaConfig
from .family import FamilyConfig
from .flux import FluxConfig
from .flux2 import Flux2Config
from .qwen_image import QwenImageConfig
from .sd3 import SD3Config
from .z_image import ZImageConfig

TINY_FLUX = FluxConfig(
    hidden=512,
    heads=4,
    channels=16,
    context=4096,
    pooled=768,
    mlp=2048,
    double_blocks=2,
    single_blocks=2,
    guidance=True,
)
FLUX_DEV = FluxConfig(
    hidden=3072,
    heads=24,
    channels=16,
    context=4096,
    pooled=768,
    mlp=12288,
    double_blocks=19,
    single_blocks=38,
    guidance=True,
)
"""FLUX.1-dev's own sizes."""
TINY_FLUX2 = Flux2Config(
    hidden=512,
    heads=4,
    channels=128,
    context=1024,
    mlp=1536,
    double_blocks=2,
    single_blocks=2,
    guidance=True,
)
FLUX2_DEV = Flux2Config(
    hidden=6144,
    heads=48,
    channels=128,
    context=15360,
    mlp=18432,
    double_blocks=8,
    single_blocks=48,
    guidance=True,
)
"""FLUX.2-dev's own sizes."""
CHROMA = ChromaConfig(
    hidden=3072,
    heads=24,
    channels=16,
    context=4096,
    mlp=12288,
    double_blocks=19,
    single_blocks=38,
    approximator=5120,
)
"""Chroma1's own sizes."""
TINY_CHROMA = ChromaConfig(
    hidden=512,
    heads=4,
    channels=16,
    context=4096,
    mlp=2048,
    double_blocks=2,
    single_blocks=2,
    approximator=512,
)
QWEN_IMAGE = QwenImageConfig(hidden=3072, heads=24, channels=16, context=3584, mlp=12288, blocks=60)
"""Qwen-Image's own sizes."""
TINY_QWEN_IMAGE = QwenImageConfig(hidden=512, heads=4, channels=16, context=3584, mlp=2048, blocks=2)
SD35_LARGE = SD3Config(
    hidden=2432, heads=38, channels=16, context=4096, pooled=2048, mlp=9728, blocks=38, positions=192
)
"""Stable Diffusion 3.5 large's own sizes."""
SD35_MEDIUM = SD3Config(
    hidden=1536,
    heads=24,
    channels=16,
    context=4096,
    pooled=2048,
    mlp=6144,
    blocks=24,
    second_attentions=13,
    positions=384,
)
"""Stable Diffusion 3.5 medium's own sizes."""
SD3_MEDIUM = replace(SD35_MEDIUM, second_attentions=0, normed=False, positions=192)
"""Stable Diffusion 3 medium's own sizes."""
TINY_SD3 = SD3Config(
    hidden=256,
    heads=4,
    channels=16,
    context=4096,
    pooled=2048,
    mlp=1024,
    blocks=4,
    second_attentions=1,
    positions=64,
)
Z_IMAGE = ZImageConfig(hidden=3840, heads=30, channels=16, context=2560, mlp=10240, blocks=30)
"""Z-Image's own sizes, Turbo's and Base's."""
TINY_Z_IMAGE = ZImageConfig(
    hidden=512, heads=4, channels=16, context=2560, mlp=1536, image_blocks=1, context_refiners=1, blocks=2
)


class FullAndTiny(NamedTuple):
    """A family's models: of full size, and one that runs in no time."""

    full: FamilyConfig
    tiny: FamilyConfig


MODELS = {
    "flux": FullAndTiny(FLUX_DEV, TINY_FLUX),
    "flux2": FullAndTiny(FLUX2_DEV, TINY_FLUX2),
    "chroma": FullAndTiny(CHROMA, TINY_CHROMA),
    "qwen": FullAndTiny(QWEN_IMAGE, TINY_QWEN_IMAGE),
    "sd3": FullAndTiny(SD35_LARGE, TINY_SD3),
    "z_image": FullAndTiny(Z_IMAGE, TINY_Z_IMAGE),
}
"""One entry per family, by the name that the benchmarks' command lines take."""


def random_state(model: nn.Module, *, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Values for a (meta) model's parameters: weights N(0, 1 / fan_in), norms 1, biases N(0, 0.02^2)."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and not name.endswith("bias"):
            value = torch.ones(parameter.shape)
        else:
            std = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.02
            value = torch.randn(parameter.shape, generator=generator) * std
        state[name] = value.to(dtype)
    return state


def write_checkpoint(path: str, config: FamilyConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
    """Writes a random file of a model, in its family's key layout."""
    with torch.device("meta"):
        model = config.build()
    state = random_state(model, seed=seed, dtype=dtype)
    save_file({model.file_key(name): tensor for name, tensor in state.items()}, path)
