"""What commands are given: a file's model on some devices, and random inputs of its shapes."""

import functools

import torch

from ..config import ModelSpec
from ..devices import Devices, supports_bfloat16
from ..models.family import FamilyConfig
from ..models.files import read_model
from ..prompt import Prompt
from ..weights.dtypes import choose_types, main_dtype
from ..weights.tensor_info import TensorInfo

BOUNDS = {"float32": 2e-5, "bfloat16": 5e-2, "float16": 1e-2}
"""By how much the ranks may differ from one, by compute type: rounding in another order."""


def describe(
    path: str, devices: Devices, *, bfloat16: bool | None = None
) -> tuple[dict[str, TensorInfo], FamilyConfig, ModelSpec]:
    """Returns the tensors of a file's model, the model, and how USP Loader's default loads it on `devices`. bfloat16:
    whether they compute it, where they are not asked.

    Raises CheckpointError.
    """
    file = read_model(path)
    file.log_ignored()
    header, config = file.header, file.config
    types = choose_types(
        None,
        main_dtype(header),
        cpu=devices.type == "cpu",
        bfloat16=supports_bfloat16(devices) if bfloat16 is None else bfloat16,
        float16=config.float16,
    )
    return header, config, file.spec(**types)


def random_inputs(config: FamilyConfig, size: tuple[int, int], text: int) -> tuple[torch.Tensor, Prompt]:
    """Makes latents (1, C, h, w) and a prompt of `text` tokens for an image of (width, height) pixels."""
    generator = torch.Generator().manual_seed(0)
    width, height = (edge // config.downscale for edge in size)
    x = torch.randn(1, config.channels, height, width, generator=generator)
    draw = functools.partial(torch.randn, generator=generator)
    return x, config.example_prompt(draw, text=text, size=(height, width))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the relative difference (Frobenius), against b."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()
