"""What a request's named tensors mean."""

import torch

from ..errors import RequestError
from ..models.family import Residuals
from ..prompt import Prompt, Tensors, is_prompt_tensor, take
from ..protocol import Evaluate

CONTROL = "control."
"""In front of the numbers of a ControlNet's tensors."""


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
        self._conditionings: dict[tuple[tuple, tuple[int, ...]], Prompt] = {}

    def clear(self) -> None:
        self._kept.clear()
        self._conditionings.clear()

    def conditioning(self, request: Evaluate, tensors: Tensors) -> Prompt:
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
        conditioning = Prompt.from_tensors(tensors, method)
        names = [name for name in tensors if is_prompt_tensor(name)]
        if any(name not in numbers for name in names):
            return conditioning  # not all of it was kept
        names.sort()
        key = (*names, method), tuple(numbers[name] for name in names)
        return self._conditionings.setdefault(key, conditioning)
