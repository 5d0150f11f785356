"""Trains the model that draws shapes (fastusp_backend/shapes): rectified flow on pictures that a program draws.

    python benchmarks/train_shapes.py --out fastusp_shapes.safetensors

diffusers' FLUX.1 on one GPU, its weights rounded to fp8 (e4m3) in every forward pass, as the file has them. One of ten
captions is held back; at the end pictures of 200 of them are checked in pixels.
"""

import argparse
import contextlib
import copy
import functools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import paths  # noqa: F401
import torch
from common import random_model
from diffusers_models import diffusers_model, flux_sizes
from muon import Muon
from safetensors.torch import load_file, save_file
from shape_data import ShapeData
from torch.nn.utils import parametrize

from fastusp_backend.models import synthetic
from fastusp_backend.models.flux import FluxConfig
from fastusp_backend.shapes import captions, decode, examples, unmet

SIZES = ((256, 256), (256, 384), (384, 256), (512, 512))
SHARES = (0.88, 0.04, 0.04, 0.04)
"""Heights and widths in pixels, and how often each is trained on."""
NARROW = 0.5
"""Share of steps in bf16: in one precision alone a model learns how that rounds, too, and draws in no other."""
EMA = 0.999
DECAY = 0.1
"""Of all weights and biases. Without it the tokens grow a thousandfold, and bf16 rounds away what they say."""
CHECKED, STEPS = 200, 20


class Rounded(torch.nn.Module):
    """Values of e4m3, with the gradient of those that are not rounded."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (weight.to(torch.float8_e4m3fn).to(weight.dtype) - weight).detach()


def patched(x: torch.Tensor) -> torch.Tensor:
    """(B, 16, h, w) -> (B, h w / 4, 64), and back by `unpatched`."""
    return x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def narrower(device: torch.device) -> Callable:
    """What makes a context in which matrices are multiplied in bf16."""
    return functools.partial(torch.autocast, device.type, torch.bfloat16, cache_enabled=False)


def unpatched(x: torch.Tensor, h: int, w: int) -> torch.Tensor:
    return x.unflatten(-1, (16, 2, 2)).unflatten(1, (h // 2, w // 2)).permute(0, 3, 1, 4, 2, 5).reshape(-1, 16, h, w)


def velocity(model, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
    b, _, h, w = x.shape
    context, pooled = captions.embed(tokens)
    ids = torch.zeros(h // 2, w // 2, 3, device=x.device)
    ids[..., 1] += torch.arange(h // 2, device=x.device)[:, None]
    ids[..., 2] += torch.arange(w // 2, device=x.device)
    out = model(
        hidden_states=patched(x),
        encoder_hidden_states=context,
        pooled_projections=pooled,
        timestep=t,
        guidance=guidance,
        img_ids=ids.flatten(0, 1),
        txt_ids=ids.new_zeros(captions.TOKENS, 3),
        return_dict=False,
    )[0]
    return unpatched(out.float(), h, w)


def loss_of(velocity, model, x0: torch.Tensor, tokens: torch.Tensor, generator, precision) -> torch.Tensor:
    """The mean square of what the velocity differs by from noise less picture, at times of which most are
    noisy: there it is decided what is drawn. velocity: the function of that name, or it compiled."""
    count, like = len(x0), {"generator": generator, "device": x0.device}
    noise, t = torch.randn(x0.shape, **like), (torch.randn(count, **like) + 0.5).sigmoid()
    t = torch.where(torch.rand(count, **like) < 0.3, torch.rand(count, **like), t)
    at = t[:, None, None, None]
    guidance = 1 + 4 * torch.rand(count, **like)  # which is to change nothing
    with precision():
        found = velocity(model, torch.lerp(x0, noise, at), t, tokens, guidance)
    return (found - (noise - x0)).square().mean()


@torch.inference_mode()
def met(model, device: torch.device, size: tuple[int, int], precision) -> tuple[float, list[str]]:
    """The share of held-back captions that their pictures meet, and what is wrong with the others."""
    chosen, wrong = examples(CHECKED), []
    for start in range(0, CHECKED, 50):
        some = chosen[start : start + 50]
        tokens = torch.tensor([captions.numbers(caption) for caption in some], device=device)
        x = torch.randn(len(some), 16, size[0] // 8, size[1] // 8, generator=torch.Generator().manual_seed(start))
        x, sigmas = x.to(device), torch.linspace(1, 0, STEPS + 1).tolist()
        for now, after in zip(sigmas, sigmas[1:], strict=False):
            t = torch.full((len(some),), now, device=device)
            with precision():
                x = x + (after - now) * velocity(model, x, t, tokens, torch.full_like(t, 3.5))
        for caption, picture in zip(some, decode(x).cpu(), strict=True):
            problems = unmet(caption, picture)
            wrong += [f"{caption}: {', '.join(problems)}"] if problems else []
    return 1 - len(wrong) / CHECKED, wrong


def file_tensors(trained: dict[str, torch.Tensor], config: FluxConfig) -> dict[str, torch.Tensor]:
    """diffusers' weights under FLUX.1's keys: matrices in e4m3, all else in bf16."""
    ours = random_model(config, torch.device("cpu"), torch.float32)
    diffusers_model(ours).load_state_dict(trained)  # whose parameters are views of ours, but for one
    state = {ours.file_key(name): tensor for name, tensor in ours.state_dict().items()}
    for kind in ("weight", "bias"):
        scale, shift = trained[f"norm_out.linear.{kind}"].chunk(2)
        state[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    types = {key: torch.float8_e4m3fn if tensor.dim() == 2 else torch.bfloat16 for key, tensor in state.items()}
    return {key: tensor.to(types[key]).contiguous() for key, tensor in state.items()}


def made(config: FluxConfig, weights: Path | None) -> torch.nn.Module:
    """diffusers' model with first weights, or with those of a file that `file_tensors` made."""
    import diffusers

    if weights is not None:
        tensors, ours = load_file(weights), random_model(config, torch.device("cpu"), torch.float32)
        with torch.no_grad():
            for name, tensor in ours.state_dict().items():
                tensor.copy_(tensors[ours.file_key(name)])
        return diffusers_model(ours).requires_grad_(True)
    model = diffusers.FluxTransformer2DModel(**flux_sizes(config))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5 * 0.7)
            torch.nn.init.zeros_(module.bias)
    torch.nn.init.normal_(model.proj_out.weight, std=1e-2)
    return model


def plain(model) -> dict[str, torch.Tensor]:
    """The state without parametrisations, rounded."""
    state = {}
    for name, tensor in model.state_dict().items():
        rounded = tensor.to(torch.float8_e4m3fn) if tensor.dim() == 2 else tensor
        state[plain_name(name)] = rounded.float().cpu()
    return state


def plain_name(name: str) -> str:
    return name.replace(".parametrizations.weight.original", ".weight")


class Training:
    """Steps of training: on a GPU one CUDA graph for each size, since Python takes longer than the GPU otherwise."""

    def __init__(self, model: torch.nn.Module, data: ShapeData, batch: int):
        self.averaged = copy.deepcopy(model)
        for module in [module for module in model.modules() if isinstance(module, torch.nn.Linear)]:
            parametrize.register_parametrization(module, "weight", Rounded())
        named = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        self._parameters = [named[name] for name, _ in self.averaged.named_parameters()]
        device = self._parameters[0].device
        self._cuda = device.type == "cuda"
        self.rate, self._losses = torch.zeros((), device=device), torch.zeros(2, device=device)
        matrices = [p for name, p in named.items() if p.dim() == 2 and "transformer_blocks" in name]
        others = [p for name, p in named.items() if p.dim() != 2 or "transformer_blocks" not in name]
        self._muon = Muon(matrices, self.rate, DECAY)
        self._adam = torch.optim.AdamW(
            others, lr=self.rate, betas=(0.9, 0.99), weight_decay=DECAY, capturable=self._cuda, foreach=self._cuda
        )
        self._model, self._data, self._batch = model, data, batch
        self._generator = torch.Generator(device).manual_seed(data.generator.initial_seed() + 1)
        self._quick = torch.compile(velocity, dynamic=False) if self._cuda else velocity
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, torch.Tensor]]] = {}

    def step(self, size: tuple[int, int], narrow: bool) -> None:
        """One step on pictures of a size, (height, width) in pixels, at `rate`, in bf16 where `narrow`."""
        count = self._batch * SIZES[0][0] * SIZES[0][1] // (size[0] * size[1])
        batch = self._data.batch(count, size)
        if not self._cuda:
            self._step(size, narrow, batch)
            return
        if (size, narrow) not in self._graphs:
            self._graphs[size, narrow] = self._captured(size, narrow, batch)
        graph, buffers = self._graphs[size, narrow]
        for buffer, now in zip(buffers, batch, strict=True):
            buffer.copy_(now)
        graph.replay()

    def mean_loss(self) -> float:
        """Of the steps since the last call."""
        total, count = self._losses.tolist()
        self._losses.zero_()
        return total / count

    def _captured(self, size: tuple[int, int], narrow: bool, batch):
        """The graph of a step after three that are not in it, and the buffers from which it takes its batch."""
        buffers = tuple(tensor.clone() for tensor in batch)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step(size, narrow, buffers)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph):
            self._step(size, narrow, buffers)
        return graph, buffers

    def _step(self, size: tuple[int, int], narrow: bool, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        # Other code would take longer to compile than it saves, and in bf16 compiled code rounds less than others do.
        how = self._quick if size == SIZES[0] and not narrow else velocity
        precision = narrower(self.rate.device) if narrow else contextlib.nullcontext
        loss = loss_of(how, self._model, *batch, self._generator, precision)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._muon.step()
        self._adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), self._parameters, 1 - EMA)
        self._losses += torch.stack([loss.detach(), torch.ones_like(loss)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="a file that was trained before, to go on from")
    parser.add_argument("--blocks", default="1,1", help="double and single ones")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch", type=int, default=256, help="pictures of 256 x 256, of larger ones as many tokens")
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end the schedule sooner")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    a = parser.parse_args()
    device, (doubles, singles) = torch.device(a.device), map(int, a.blocks.split(","))
    torch.manual_seed(a.seed)
    torch.set_float32_matmul_precision("high")  # TF32
    torch.backends.cuda.enable_cudnn_sdp(False)  # whose backward pass failed with cuDNN 9.19 on H200
    sizes = {"hidden": a.hidden, "heads": a.hidden // 128, "mlp": 4 * a.hidden}
    config = replace(synthetic.TINY_FLUX, **sizes, double_blocks=doubles, single_blocks=singles)
    training = Training(made(config, a.weights).to(device), ShapeData(device, a.seed, quick=SIZES[0]), a.batch)
    which = torch.Generator().manual_seed(a.seed)
    started, done = time.perf_counter(), 0
    machine = torch.cuda.get_device_name() if a.device == "cuda" else "CPU"
    print(f"{sum(p.numel() for p in training.averaged.parameters())} parameters on {machine}", flush=True)
    for step in range(a.steps):
        elapsed = time.perf_counter() - started
        progress = max(step / a.steps, elapsed / a.seconds)
        if progress >= 1:
            break
        training.rate.fill_(a.rate * min(1, (step + 1) / 300) * (0.5 + 0.5 * math.cos(math.pi * progress)))
        size = SIZES[torch.multinomial(torch.tensor(SHARES), 1, generator=which).item()]
        training.step(size, narrow=torch.rand((), generator=which).item() < NARROW)
        done = step + 1
        if done % 1000 == 0:
            print(f"{done} steps, {elapsed:.0f} s: loss {training.mean_loss():.4f}", flush=True)
    trained = plain(training.averaged)
    much = f"{done} steps of {a.batch}, {time.perf_counter() - started:.0f} s on {machine}"
    save_file(file_tensors(trained, config), str(a.out), {"title": "FastUSP shapes", "trained": much})
    print(f"{a.out}: {a.out.stat().st_size} bytes, {much}", flush=True)
    training.averaged.load_state_dict(trained)
    for size in (SIZES[0], SIZES[3]):
        for name, precision in (("float32", contextlib.nullcontext), ("bf16", narrower(device))):
            share, wrong = met(training.averaged, device, size, precision)
            print(f"{size[0]} x {size[1]}, {STEPS} steps, {name}: {share:.1%} of {CHECKED} held-back captions met")
            print("\n".join(wrong[:12]), flush=True)


if __name__ == "__main__":
    main()
