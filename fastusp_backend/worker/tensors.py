"""What a request's named tensors mean."""

import torch

from ..errors import RequestError
from ..models.family import Conditioning, Residuals

Tensors = dict[str, torch.Tensor]

OPTIONAL = ("y", "guidance", "concat")
"""Tensors of a prompt beside its context and references."""

CONTROL = "control."
"""In front of the numbers of a ControlNet's tensors."""


def take(tensors: Tensors, name: str) -> torch.Tensor:
    if name not in tensors:
        raise RequestError(f"the request lacks tensor {name!r}")
    return tensors[name]


def like(x: torch.Tensor, tensors: Tensors, name: str) -> torch.Tensor:
    tensor = take(tensors, name)
    try:
        return tensor.expand(x.shape)
    except RuntimeError as error:
        raise RequestError(
            f"tensor {name!r} {tuple(tensor.shape)} does not fit the latents {tuple(x.shape)}"
        ) from error


def conditioning_of(tensors: Tensors, prefix: str, reference_method: str | None) -> Conditioning:
    references = []
    while (name := f"{prefix}reference.{len(references)}") in tensors:
        references.append(tensors[name])
    return Conditioning(
        context=take(tensors, prefix + "context"),
        references=tuple(references),
        reference_method=reference_method,
        **{name: tensors.get(prefix + name) for name in OPTIONAL},
    )


def residuals_of(control: dict[str, list[int | None]], tensors: Tensors) -> Residuals:
    last = max((n for places in control.values() for n in places if n is not None), default=-1)
    return Residuals(
        tuple(take(tensors, f"{CONTROL}{n}") for n in range(last + 1)),
        *(tuple(control.get(kind, ())) for kind in ("input", "output")),
    )
