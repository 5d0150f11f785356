"""Prompts that the client sends once, for evaluations to come."""

import torch

from ..errors import TensorsLost
from ..prompt import Prompt, Tensors, is_prompt_tensor, take
from ..protocol import Evaluate


class PromptCache:
    """Tensors by the numbers that `pool.sent` gave them, and the prompts that were made of them."""

    def __init__(self):
        self._tensors: dict[int, torch.Tensor] = {}
        self._prompts: dict[tuple[tuple, tuple[int, ...]], Prompt] = {}

    def clear(self) -> None:
        self._tensors.clear()
        self._prompts.clear()

    def prompt(self, request: Evaluate, tensors: Tensors) -> Prompt:
        """The request's prompt. The same cached tensors give the same object, so that what was computed from it lasts.

        Raises TensorsLost for a tensor that is not in the cache.
        """
        for number in request.forget:
            self._tensors.pop(number, None)
            self._prompts = {key: prompt for key, prompt in self._prompts.items() if number not in key[1]}
        for name, number in request.keep.items():
            self._tensors[number] = take(tensors, name)
        for name, number in request.reuse.items():
            if number not in self._tensors:
                raise TensorsLost(f"tensor {name!r} should have been kept as {number}, but was not")
            tensors[name] = self._tensors[number]
        numbers, method = request.keep | request.reuse, request.reference_method
        prompt = Prompt.from_tensors(tensors, method)
        names = sorted(name for name in tensors if is_prompt_tensor(name))
        if any(name not in numbers for name in names):
            return prompt  # not all of it is cached
        key = (*names, method), tuple(numbers[name] for name in names)
        return self._prompts.setdefault(key, prompt)
