"""Small models, and requests for them, that several tests use."""

import contextlib
import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastusp_backend.comm.mesh import single_rank_mesh
from fastusp_backend.comm.transport import Transport
from fastusp_backend.config import FileState, ModelSpec, Settings
from fastusp_backend.engine import Denoiser
from fastusp_backend.engine.checkpoint import Checkpoint
from fastusp_backend.errors import CheckpointError
from fastusp_backend.models.chroma import ChromaConfig
from fastusp_backend.models.family import NO_RESIDUALS, FamilyConfig, Residuals, Transformer
from fastusp_backend.models.flux import FluxConfig
from fastusp_backend.models.flux2 import Flux2Config
from fastusp_backend.models.qwen_image import QwenImageConfig
from fastusp_backend.models.sd3 import SD3Config
from fastusp_backend.models.z_image import ZImageConfig
from fastusp_backend.prompt import Prompt

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
SMALL_FLUX2 = Flux2Config(
    hidden=512,
    heads=4,
    channels=128,
    context=64,
    mlp=768,
    double_blocks=2,
    single_blocks=2,
    guidance=True,
)
SMALL_CHROMA = ChromaConfig(
    hidden=512,
    heads=4,
    channels=16,
    context=64,
    mlp=1024,
    double_blocks=2,
    single_blocks=2,
    approximator=64,
)
SMALL_QWEN = QwenImageConfig(hidden=512, heads=4, channels=16, context=64, mlp=1024, blocks=2)
SMALL_SD3 = SD3Config(
    hidden=256,
    heads=4,
    channels=16,
    context=64,
    pooled=32,
    mlp=1024,
    blocks=3,
    second_attentions=2,
    positions=12,
)
SMALL_Z_IMAGE = ZImageConfig(hidden=512, heads=4, channels=16, context=64, mlp=768, blocks=2)


SOME_FILE = FileState(device=1 << 40, inode=1 << 62, size=1 << 35, mtime_ns=1 << 60)


def spec_of(path) -> ModelSpec:
    return ModelSpec.of_file(str(path), storage=None, compute="float32")


def refusal_of_changed(path, name: str, shape: tuple[int, ...] | None) -> str:
    """Why a file is refused of which the tensor `name` has another shape, or is missing (None)."""
    state = load_file(path)
    del state[name]
    save_file(state | ({} if shape is None else {name: torch.zeros(shape)}), path)
    with pytest.raises(CheckpointError) as refused:
        load_model(spec_of(path), torch.device("cpu"))
    assert str(path) in str(refused.value)
    return str(refused.value)


def load_model(spec: ModelSpec, device: torch.device) -> Transformer:
    """Reads a file onto `device`, on one rank. Raises as `Checkpoint`."""
    checkpoint = Checkpoint(spec)
    checkpoint.allocate(device)
    return checkpoint.read()


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Inputs:
    x: torch.Tensor
    timestep: torch.Tensor
    context: torch.Tensor
    y: torch.Tensor | None
    guidance: torch.Tensor | None


def inputs(config: FamilyConfig, *, text: int, size: tuple[int, int], batch: int = 1, seed: int = 0) -> Inputs:
    seeds = itertools.count(seed)

    def draw(*shape: int) -> torch.Tensor:
        return randn(*shape, seed=next(seeds))

    x, timestep = draw(batch, config.channels, *size), config.timestep_scale * torch.linspace(0.7, 0.3, batch)
    prompt = config.example_prompt(draw, text=text, size=size, batch=batch)
    return Inputs(x, timestep, prompt.context, prompt.y, prompt.guidance)


class OneRank(Denoiser):
    """velocity = one_rank(x, timestep, prompt): a model on one rank, one prompt at a time."""

    def __init__(
        self, model: Transformer, settings: Settings | None = None, dtype: torch.dtype = torch.float32, device="cpu"
    ):
        mesh = single_rank_mesh(torch.device(device))
        super().__init__(model, mesh, Transport(mesh), settings or Settings(), dtype)
        self.model, self.evaluations = model, self._evaluations

    def __call__(self, x, timestep, prompt: Prompt, control: Residuals = NO_RESIDUALS) -> torch.Tensor:
        (velocity,) = super().__call__(x, timestep, [prompt], lambda: None, control)
        return velocity


REORDERED = 1e-5
"""How far evaluations of one model may be apart, relative to the largest value, whose equal weights lie at other
addresses: where memory is aligned otherwise, a product may sum in another order. A sum of some hundred float32 values
differs by about 1e-6 then (1.7e-6 was seen of whole evaluations), and passes through a few layers. What is wrong in a
single weight may be less than that: bits are demanded of the weights themselves."""


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def open_files() -> list[str]:
    """What this process's descriptors lead to."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that by which the folder is read
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return found


def parent(process: int) -> int:
    """The process that started this one."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
