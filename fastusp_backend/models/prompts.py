"""What a prompt is to a model: where its references lie, and what of it does not fit."""

from typing import TYPE_CHECKING

import torch

from ..prompt import Prompt
from .patchify import patch_grid
from .positions import METHODS, References
from .residuals import Residuals

if TYPE_CHECKING:
    from .family import FamilyConfig


def references_of(config: "FamilyConfig", prompt: Prompt) -> References:
    """How the model places a prompt's references."""
    if not prompt.references:
        return References(config.patch)
    method = prompt.reference_method or config.reference_method
    sizes = tuple(tuple(latent.shape[-2:]) for latent in prompt.references)
    return References(config.patch, sizes, method if method in config.reference_methods else "offset")


def check_prompt(x: torch.Tensor, prompt: Prompt, config: "FamilyConfig") -> str | None:
    """What is wrong with a prompt for latents x (B, ...) and a model; None if nothing."""
    context, guidance, b = prompt.context, prompt.guidance, len(x)
    if context.dim() != 3 or context.shape[0] != b or context.shape[1] < 1 or context.shape[2] != config.context:
        return (
            f"choose the text encoders of {config.family}, {config.encoders}: the prompt's tensor "
            f"{tuple(context.shape)} does not fit the model: expected ({b}, T, {config.context})"
        )
    if guidance is not None and guidance.shape not in ((1,), (b,)):
        return f"the guidance {tuple(guidance.shape)} does not fit the latents: expected ({b},)"
    return _check_concat(x, prompt.concat, config) or _check_references(x, prompt, config)


def _check_concat(x: torch.Tensor, concat: torch.Tensor | None, config: "FamilyConfig") -> str | None:
    expected = (len(x), config.concat_channels, *x.shape[2:])
    given = None if concat is None else tuple(concat.shape)
    if given == (expected if config.concat_channels else None):
        return None
    if concat is None:
        return f"the model takes {config.concat_channels} channels of an image or mask beside the latents; got none"
    wanted = f"expected {expected}" if config.concat_channels else "it takes latents alone"
    return f"the image or mask channels {given} do not fit the model: {wanted}"


def _check_references(x: torch.Tensor, prompt: Prompt, config: "FamilyConfig") -> str | None:
    method = prompt.reference_method
    if method is not None and method not in METHODS:
        return f"the reference method {method!r} is not one of: {', '.join(METHODS)}"
    for latent in prompt.references:
        shape, frames = tuple(latent.shape), tuple(latent.shape[2:-2])
        if shape[:2] != (len(x), config.channels) or frames not in ((), (1,)) or not latent.numel():
            expected = f"({len(x)}, {config.channels}, [1,] h, w)"
            return f"a reference latent {shape} does not fit the model: expected {expected}"
    if prompt.references and not config.reference_methods:
        return f"remove the reference images from the prompt: {config.family} takes none"
    if prompt.references and config.concat_channels:
        return "a model of Fill, Canny or Depth kind takes no reference latents"
    return None


def check_control(x: torch.Tensor, prompt: Prompt, residuals: Residuals, config: "FamilyConfig") -> str | None:
    """What is wrong with a ControlNet's tensors for latents x (B, ..., h, w); None if nothing."""
    if residuals.skipped and not config.skips_blocks:
        return f"remove the node that leaves out blocks (Skip Layer Guidance): FastUSP runs none with {config.family}"
    if residuals.tensors and not config.takes_control:
        return f"remove the ControlNet from the prompt: FastUSP runs none with {config.family}"
    rows, columns = patch_grid(*x.shape[-2:], config.patch)
    most = rows * columns + references_of(config, prompt).tokens
    for tensor in residuals.tensors:
        fits = tensor.dim() == 3 and tensor.shape[0] in (1, len(x)) and tensor.shape[2] == config.hidden
        if not fits or not 0 < tensor.shape[1] <= most:
            return (
                f"choose a ControlNet that was made for this model: its tensor {tuple(tensor.shape)} does not fit: "
                f"expected ({len(x)}, up to {most}, {config.hidden})"
            )
    return None
