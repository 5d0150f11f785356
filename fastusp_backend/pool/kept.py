"""Prompt tensors that the workers of a pool hold on to."""

import threading

import torch

from ..prompt import Tensors

KEPT_TENSORS = 16
"""Two prompts' worth of context, y, guidance, further channels and references, and a little more."""


class KeptTensors:
    """Which tensors a pool's workers hold, by number: a prompt is sent once, not at each of its evaluations.

    Tensors are compared by value: a sampler may hand over a new tensor with the old content at each step.
    """

    def __init__(self):
        self.lock = threading.Lock()
        """Held from `sort` until its request has ended: what one call keeps, the next may reuse."""
        self._epoch = -1
        self._numbers: dict[int, torch.Tensor] = {}
        self._distrusted: list[int] = []
        self._next = 0

    def sort(self, tensors: Tensors, epoch: int) -> tuple[Tensors, dict[str, int], dict[str, int], list[int]]:
        """tensors -> (those to send, keep, reuse, forget): see `protocol.Evaluate`."""
        if epoch != self._epoch:
            self._numbers.clear()
            self._distrusted.clear()
            self._epoch = epoch
        send, keep, reuse = {}, {}, {}
        for name, tensor in tensors.items():
            number = self._find(tensor)
            if number is None:
                number, self._next = self._next, self._next + 1
                keep[name], send[name] = number, tensor
                self._numbers[number] = tensor.clone()  # the caller may write to its own
                continue
            self._numbers[number] = self._numbers.pop(number)  # used last, forgotten last
            reuse[name] = number
        surplus = len(self._numbers) - max(KEPT_TENSORS, len(tensors))  # never of this prompt
        surplus_numbers = list(self._numbers)[: max(0, surplus)]
        for number in surplus_numbers:
            del self._numbers[number]
        forget, self._distrusted = self._distrusted + surplus_numbers, []
        return send, keep, reuse, forget

    def distrust(self, forget: list[int]) -> None:
        """After a request that failed, perhaps before it arrived: all is sent anew. forget: what it was to drop."""
        self._distrusted = forget + list(self._numbers)
        self._numbers.clear()

    def _find(self, tensor: torch.Tensor) -> int | None:
        for number, known in self._numbers.items():
            same_kind = known.shape == tensor.shape and known.dtype == tensor.dtype and known.device == tensor.device
            if same_kind and torch.equal(known, tensor):
                return number
        return None
