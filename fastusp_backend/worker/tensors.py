"""What a request's named tensors mean."""

import torch

from ..errors import RequestError
from ..models.family import Conditioning, Residuals
from ..protocol import Evaluate

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


class KeptPrompts:
    """Prompts' tensors that the client sends once, for evaluations to come."""

    def __init__(self):
        self._kept: dict[int, torch.Tensor] = {}
        self._conditionings: dict[tuple[tuple, tuple[int, ...]], Conditioning] = {}

    def clear(self) -> None:
        self._kept.clear()
        self._conditionings.clear()

    def conditioning(self, request: Evaluate, tensors: Tensors) -> Conditioning:
        """The request's prompt. The same kept tensors give the same object, so that what was computed from it lasts.

        Raises RequestError for a tensor that should have been kept.
        """
        for number in request.forget:
            self._kept.pop(number, None)
            self._conditionings = {k: v for k, v in self._conditionings.items() if number not in k[1]}
        for name, number in request.keep.items():
            self._kept[number] = take(tensors, name)
        for name, number in request.reuse.items():
            if number not in self._kept:
                raise RequestError(f"tensor {name!r} should have been kept as {number}, but was not")
            tensors[name] = self._kept[number]
        numbers, method = request.keep | request.reuse, request.reference_method
        conditioning = conditioning_of(tensors, "", method)
        names = [name for name in tensors if name in ("context", *OPTIONAL) or name.startswith("reference.")]
        if any(name not in numbers for name in names):
            return conditioning  # not all of it was kept
        names.sort()
        key = (*names, method), tuple(numbers[name] for name in names)
        return self._conditionings.setdefault(key, conditioning)
