"""ODE and ancestral samplers for rectified flow, as pure functions.

A sampler is f(model, x, sigmas, *, noise, callback, **options) -> x with
- model(x, sigma) -> denoised; x (B, C, h, w) float32; sigmas (n + 1,) float32, falling, the last usually 0;
- noise: an iterator over the draws, each as x; the host draws all of them, in the order in which they are used here;
- callback(StepState) once a step, after the step's first evaluation and before x moves on.

They are the algorithms that ComfyUI offers under these names and give its results to rounding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class StepState:
    """A step as its callback sees it.

    index: the step's number, from 0.
    sigma: the noise level before it.
    x: the latents before it, (B, C, h, w).
    denoised: the model's answer for them.
    """

    index: int
    sigma: torch.Tensor
    x: torch.Tensor
    denoised: torch.Tensor


Callback = Callable[[StepState], None]


def euler(model: Model, x, sigmas, *, noise: Iterator[torch.Tensor], callback: Callback):
    """x' = x + (sigma' - sigma) d, with d = (x - denoised) / sigma (arXiv 2206.00364, algorithm 2 without churn)."""
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        denoised = model(x, sigma)
        callback(StepState(i, sigma, x, denoised))
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


def euler_ancestral(
    model: Model,
    x,
    sigmas,
    *,
    noise: Iterator[torch.Tensor],
    callback: Callback,
    eta: float = 1.0,
    s_noise: float = 1.0,
):
    """Euler to a lower level, then noise back up, so that x stays sigma noise + (1 - sigma) image in distribution.

    The lower level is sigma' (1 + (sigma' / sigma - 1) eta); alpha = 1 - sigma is the image's share.
    """
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        denoised = model(x, sigma)
        callback(StepState(i, sigma, x, denoised))
        if following == 0:
            x = denoised
            continue
        down = following * (1 + (following / sigma - 1) * eta)
        alpha, alpha_down = 1 - following, 1 - down
        ratio = down / sigma
        x = ratio * x + (1 - ratio) * denoised
        if eta > 0:
            added = (following**2 - down**2 * alpha**2 / alpha_down**2) ** 0.5
            x = alpha / alpha_down * x + next(noise) * s_noise * added
    return x


def heun(model: Model, x, sigmas, *, noise: Iterator[torch.Tensor], callback: Callback):
    """Euler's step corrected by the slope at its end (arXiv 2206.00364, algorithm 1); the last step is Euler's."""
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        denoised = model(x, sigma)
        callback(StepState(i, sigma, x, denoised))
        slope, step = (x - denoised) / sigma, following - sigma
        if following != 0:
            ahead = x + slope * step
            slope = (slope + (ahead - model(ahead, following)) / following) / 2
        x = x + slope * step
    return x


def dpm_2(model: Model, x, sigmas, *, noise: Iterator[torch.Tensor], callback: Callback):
    """DPM-Solver-2 (arXiv 2206.00927): the slope at the geometric middle of the step; the last step is Euler's."""
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        denoised = model(x, sigma)
        callback(StepState(i, sigma, x, denoised))
        slope = (x - denoised) / sigma
        if following != 0:
            middle = sigma.log().lerp(following.log(), 0.5).exp()
            halfway = x + slope * (middle - sigma)
            slope = (halfway - model(halfway, middle)) / middle
        x = x + slope * (following - sigma)
    return x


def dpmpp_2m(model: Model, x, sigmas, *, noise: Iterator[torch.Tensor], callback: Callback):
    """DPM-Solver++(2M) (arXiv 2211.01095) over t = -log sigma."""
    previous = None
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        denoised = model(x, sigma)
        callback(StepState(i, sigma, x, denoised))
        h = sigma.log() - following.log()
        target = denoised
        if previous is not None and following != 0:
            ratio = (sigmas[i - 1].log() - sigma.log()) / h
            target = (1 + 1 / (2 * ratio)) * denoised - 1 / (2 * ratio) * previous
        x = following / sigma * x - torch.expm1(-h) * target
        previous = denoised
    return x


def res_multistep(model: Model, x, sigmas, *, noise: Iterator[torch.Tensor], callback: Callback):
    """Second-order exponential integrator over past steps (arXiv 2308.02157); first and last steps are Euler's."""
    previous = None
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        denoised = model(x, sigma)
        callback(StepState(i, sigma, x, denoised))
        if previous is None or following == 0:
            x = x + (x - denoised) / sigma * (following - sigma)
        else:
            h = sigma.log() - following.log()
            c2 = (sigma.log() - sigmas[i - 1].log()) / h
            phi_1 = torch.expm1(-h) / -h
            phi_2 = (phi_1 - 1) / -h
            b1 = torch.nan_to_num(phi_1 - phi_2 / c2, nan=0.0)
            b2 = torch.nan_to_num(phi_2 / c2, nan=0.0)
            x = torch.exp(-h) * x + h * (b1 * denoised + b2 * previous)
        previous = denoised
    return x


def lcm(model: Model, x, sigmas, *, noise: Iterator[torch.Tensor], callback: Callback):
    """Jump to the denoised image, noise it to the next level (latent consistency, arXiv 2310.04378)."""
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        denoised = model(x, sigma)
        callback(StepState(i, sigma, x, denoised))
        x = denoised if following == 0 else following * next(noise) + (1 - following) * denoised
    return x


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampling loop, and what a caller must know of it.

    run: the loop.
    options: its numbers with their defaults.
    draws: whether it draws noise, once in each step but the last.
    """

    run: Callable[..., torch.Tensor]
    options: dict[str, float] = field(default_factory=dict)
    draws: bool = False

    def noise_draws(self, sigmas: torch.Tensor, options: dict[str, float]) -> int:
        """How many draws `run` takes for these sigmas."""
        if not self.draws or options.get("eta", self.options.get("eta", 1.0)) <= 0:
            return 0
        return int((sigmas[1:] > 0).sum())

    def evaluations(self, sigmas: torch.Tensor) -> list[float]:
        """The sigmas at which `run` evaluates the model, in order: found by running it on a single number."""
        seen: list[float] = []

        def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            seen.append(float(sigma))
            return x

        self.run(model, torch.zeros(1), sigmas, noise=iter(torch.zeros(len(sigmas), 1)), callback=lambda state: None)
        return seen


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(euler),
    "euler_ancestral": Sampler(euler_ancestral, {"eta": 1.0, "s_noise": 1.0}, draws=True),
    "heun": Sampler(heun),
    "dpm_2": Sampler(dpm_2),
    "dpmpp_2m": Sampler(dpmpp_2m),
    "res_multistep": Sampler(res_multistep),
    "lcm": Sampler(lcm, draws=True),
}
"""By ComfyUI's names. Its `ddim` is `euler` with other inpainting noise, which the host makes."""
