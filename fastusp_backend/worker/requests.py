"""What a request asks for, checked: from a message and its tensors to what is computed.

Pure functions, which all ranks call alike: none of them exchanges anything, and what they refuse is refused before
anything runs. What only the model knows of its prompts (`Denoiser.check`) is asked for by the runner.
"""

from dataclasses import dataclass

import torch

from ..errors import LayoutError, RequestError
from ..models.family import Residuals
from ..prompt import Inpainting, Prompt, Tensors, take
from ..protocol import Evaluate, Sample
from ..protocol.messages import Request
from ..sampling import SAMPLERS

RESIDUAL = "control."
"""In front of the numbers of a ControlNet's tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingInputs:
    """What a sampling loop starts from.

    x: noised latents, (B, C, h, w).
    sigmas: noise levels, (n + 1,), on the CPU.
    noise: the sampler's draws, (k, B, C, h, w).
    negative: None leaves guidance out.
    inpainting: None without a mask.
    timesteps: the timesteps of all evaluations, rounded to float32 as the loop will compute them.
    """

    x: torch.Tensor
    sigmas: torch.Tensor
    noise: torch.Tensor
    positive: Prompt
    negative: Prompt | None
    inpainting: Inpainting | None
    timesteps: list[float]

    @property
    def prompts(self) -> list[Prompt]:
        return [self.positive] if self.negative is None else [self.positive, self.negative]

    @property
    def alike(self) -> bool:
        """Whether there are two prompts with the same tensors in the same shapes."""
        if self.negative is None:
            return False
        one, other = ({name: t.shape for name, t in prompt.tensors().items()} for prompt in self.prompts)
        return one == other


def sampling_inputs(request: Sample, tensors: Tensors) -> SamplingInputs:
    """Raises RequestError for a sampler or an option that there is not, and for tensors that are missing or do not fit
    each other."""
    if request.sampler not in SAMPLERS:
        raise RequestError(f"sampler {request.sampler!r} is not one of: {', '.join(SAMPLERS)}")
    sampler = SAMPLERS[request.sampler]
    if unknown := request.options.keys() - sampler.options.keys():
        raise RequestError(f"sampler {request.sampler!r} has no option {', '.join(sorted(unknown))}")
    x, sigmas = take(tensors, "x"), take(tensors, "sigmas").cpu()
    if sigmas.dim() != 1 or not len(sigmas):
        raise RequestError(f"sigmas {tuple(sigmas.shape)} are no list of levels")
    draws = sampler.noise_draws(sigmas, request.options)
    noise = tensors.get("noise", x.new_empty(0, *x.shape))
    if noise.shape != (draws, *x.shape):
        raise RequestError(f"{request.sampler} takes {draws} draws of noise {tuple(x.shape)}, got {tuple(noise.shape)}")
    methods = request.reference_methods
    negative = None
    if "negative.context" in tensors:
        negative = Prompt.from_tensors(tensors, methods.get("negative"), "negative.")
    # Modulations are looked up by value.
    evaluated = torch.tensor(sampler.evaluations(sigmas), dtype=torch.float32)
    return SamplingInputs(
        x=x,
        sigmas=sigmas,
        noise=noise,
        positive=Prompt.from_tensors(tensors, methods.get("positive"), "positive."),
        negative=negative,
        inpainting=Inpainting.from_tensors(tensors, x),
        timesteps=(evaluated * request.timestep_scale).tolist(),
    )


def evaluation_inputs(request: Evaluate, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, Residuals]:
    """x (B, C, h, w), timestep (B,) on the CPU, what a ControlNet adds and which blocks are left out. Raises
    RequestError for tensors that are missing or do not fit each other."""
    x, timestep = take(tensors, "x"), take(tensors, "timestep").cpu()
    if timestep.shape != x.shape[:1]:
        raise RequestError(f"timestep {tuple(timestep.shape)} does not fit the latents: expected {len(x)} values")
    last = max((n for places in request.control.values() for n in places if n is not None), default=-1)
    return (
        x,
        timestep,
        Residuals(
            tuple(take(tensors, f"{RESIDUAL}{n}") for n in range(last + 1)),
            *(tuple(request.control.get(kind, ())) for kind in ("input", "output")),
            tuple(request.skipped),
        ),
    )


def check_layout(request: Request, ranks: int, heads: int) -> None:
    """Raises LayoutError where a request's layout is none for so many ranks, or a model of so many attention heads."""
    layout = request.layout
    if layout.ranks != ranks:
        raise LayoutError(f"layout {layout} does not fit a pool of {ranks} ranks")
    if heads % layout.ulysses:
        raise LayoutError(f"a Ulysses degree of {layout.ulysses} does not divide the model's {heads} attention heads")
