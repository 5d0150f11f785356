"""What the benchmarks' ranks share: models of random weights, inputs, timing.

Weights are N(0, 1 / fan_in), norms 1, biases N(0, 0.02^2), made on the device from one seed: every process set of a run
uses the same ones. Speed and parity are real, images are not.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import paths  # noqa: F401
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fastusp_backend import shapes
from fastusp_backend.models import synthetic
from fastusp_backend.models.family import FamilyConfig, Transformer
from fastusp_backend.models.files import read_model
from fastusp_backend.prompt import Prompt

_SIZES = synthetic.MODELS | {
    "sd35_medium": synthetic.FullAndTiny(synthetic.SD35_MEDIUM, synthetic.TINY_SD3),
    "sd3_medium": synthetic.FullAndTiny(
        synthetic.SD3_MEDIUM, replace(synthetic.TINY_SD3, second_attentions=0, normed=False)
    ),
}
CONFIGS: dict[tuple[str, bool], FamilyConfig] = {
    (name, tiny): sizes.tiny if tiny else sizes.full for name, sizes in _SIZES.items() for tiny in (False, True)
}
"""By name and whether it is the tiny one."""
MODELS = tuple(_SIZES)

TIMESTEP, GUIDANCE = 0.5, 4.0
"""A thousand times either is exact in bfloat16: diffusers multiplies in the compute type."""


@dataclass(frozen=True, slots=True)
class Case:
    """One shape: an image of size x size pixels, `texts` the token count of each prompt of a step."""

    size: int
    texts: tuple[int, ...]
    batch: int


@dataclass(frozen=True, slots=True)
class Inputs:
    """x (B, C, h, w) float32, timestep (B,) on the CPU, a prompt per text."""

    x: torch.Tensor
    timestep: torch.Tensor
    prompts: tuple[Prompt, ...]


def random_model(config: FamilyConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        model = config.build()
    # Not `to_empty`: it has torch import its symbolic shapes, which takes each rank seconds.
    made = {name: torch.empty(p.shape, dtype=dtype, device=device) for name, p in model.named_parameters()}
    model.load_state_dict(made, assign=True)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and not name.endswith("bias"):
            parameter.data.fill_(1)
        else:
            std = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.02
            parameter.data.normal_(std=std, generator=generator)
    return model.eval().requires_grad_(False)


def shipped_model(device: torch.device, dtype: torch.dtype) -> Transformer:
    """Returns the small model that draws."""
    with torch.device("meta"):
        model = read_model(str(shapes.MODEL)).config.build()
    state = {model.module_key(key): tensor.to(device, dtype) for key, tensor in load_file(shapes.MODEL).items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def random_inputs(config: FamilyConfig, case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    like = {"generator": torch.Generator(device).manual_seed(1), "device": device}
    b, edge = case.batch, case.size // config.downscale
    x = torch.randn(b, config.channels, edge, edge, **like)

    def prompt(text: int) -> Prompt:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, **like).to(dtype)

        return config.example_prompt(draw, text=text, size=(edge, edge), batch=b, guidance=GUIDANCE)

    return Inputs(x, torch.full((b,), config.timestep_scale * TIMESTEP), tuple(map(prompt, case.texts)))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(run: Callable[[], torch.Tensor], count: int, device: torch.device) -> tuple[dict, torch.Tensor]:
    """Times `count` runs after three that warm up; every rank calls this together.

    Returns median, min and max in ms, the seconds of the warm-up and the peak memory in GiB by name, and the last run's
    output.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    for _ in range(3):
        run()
    synchronize(device)
    warm_up = time.perf_counter() - started
    dist.barrier()
    times = []
    for _ in range(count):
        if cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out = run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            begin = time.perf_counter()
            out = run()
            times.append((time.perf_counter() - begin) * 1000)
    figures = {"median": statistics.median(times), "min": min(times), "max": max(times), "warm_up": warm_up}
    if cuda:
        figures["peak"] = torch.cuda.max_memory_allocated(device) / 2**30
    return figures, out.float().cpu()
