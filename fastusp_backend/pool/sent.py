"""What a pool's workers were sent and have now, as far as this client knows: prompt tensors, patched weights.

Both accounts belong to the processes (`Workers`) and die with them, and only a caller whose turn it is touches them
(`Pool.run`): they need no lock. What a request changes is in doubt from when the request is planned until its answer is
confirmed. One that is refused, cancelled, left behind or interrupted anywhere in between leaves it so, without anybody
having to notice, and the next one sends all of it anew.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..config import ModelSpec, WeightPatch
from ..prompt import Tensors
from .patches import NO_PATCHES, WeightPatches

KEPT_TENSORS = 16
"""Two prompts' worth of context, y, guidance, further channels and references, and a little more."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """How a prompt's tensors reach the workers; `protocol.Evaluate` says what they make of it.

    send: the tensors to send.
    keep: name -> the number that a sent tensor gets.
    reuse: name -> the number of a tensor that the workers have.
    forget: numbers to drop.
    after: number -> tensor that the workers have when they have answered.
    """

    send: Tensors
    keep: dict[str, int]
    reuse: dict[str, int]
    forget: list[int]
    after: dict[int, torch.Tensor]


class SentTensors:
    """Which prompt tensors the workers have, by number: a prompt is sent once, not at each of its evaluations.

    Tensors are compared by value: a sampler may hand over a new tensor with the old content at each step.
    """

    def __init__(self):
        self._known: dict[int, torch.Tensor] = {}
        self._doubtful: frozenset[int] = frozenset()
        """Numbers that the workers may have or not; those of `_known` among them do not count."""
        self._numbers = itertools.count()  # no number twice: workers keep by it what they compute from a tensor

    def deliver(self, tensors: Tensors) -> Delivery:
        """Plans an evaluation of these tensors, which `confirm` follows when it was answered."""
        send, keep, reuse = {}, {}, {}
        after = {number: tensor for number, tensor in self._known.items() if number not in self._doubtful}
        for name, tensor in tensors.items():
            number = _find(after, tensor)
            if number is None:
                number = next(self._numbers)
                keep[name], send[name] = number, tensor
                after[number] = tensor.clone()  # the caller may write to its own
            else:
                after[number] = after.pop(number)  # used last, forgotten last
                reuse[name] = number
        surplus = len(after) - max(KEPT_TENSORS, len(tensors))  # never of this prompt
        dropped = list(after)[: max(0, surplus)]
        forget = sorted(self._doubtful.union(dropped))
        self._doubtful = self._doubtful.union(after)
        return Delivery(send, keep, reuse, forget, {n: tensor for n, tensor in after.items() if n not in dropped})

    def confirm(self, delivery: Delivery) -> None:
        """The evaluation was answered."""
        self._known = delivery.after
        self._doubtful = frozenset()

    def doubt(self) -> None:
        """The workers may have any of it, or none."""
        self._doubtful = self._doubtful.union(self._known)


def _find(known: dict[int, torch.Tensor], tensor: torch.Tensor) -> int | None:
    for number, other in known.items():
        same_kind = other.shape == tensor.shape and other.dtype == tensor.dtype and other.device == tensor.device
        if same_kind and torch.equal(other, tensor):
            return number
    return None


@dataclass(frozen=True, slots=True)
class Change:
    """What `protocol.Patch` says, and the tensors that go with it."""

    number: int
    base: int | None
    weights: dict[str, tuple[WeightPatch, ...]]
    tensors: Tensors


class _Weights(NamedTuple):
    """What the workers' weights are: a model's, with a patch set, whose number is None while it may be any set."""

    model: ModelSpec | None
    number: int | None
    patches: WeightPatches  # keeps the tensors alive, whose identities it is compared by


class SentPatches:
    """Which patches are in the workers' weights: a change is sent once, and of a set that resembles the last one the
    weights that differ."""

    def __init__(self):
        self._numbers = itertools.count(1)
        self._weights = _Weights(None, 0, NO_PATCHES)

    def change(self, patches: WeightPatches, model: ModelSpec) -> tuple[int, Change | None]:
        """Gives the number of the set that a request for `model` shall name, and what to send first, which `confirm`
        follows when it was answered; None for nothing.

        Workers with another model, or none, are taken to load it as its file is; where they do not, they refuse the
        request.
        """
        if self._weights.model != model:
            self._weights = _Weights(model, 0, NO_PATCHES)
        base, old = self._weights.number, self._weights.patches.weights
        if base is not None and old == patches.weights:
            return base, None
        weights = {name: wanted for name, wanted in patches.weights.items() if old.get(name) != wanted}
        weights |= {name: () for name in old.keys() - patches.weights.keys()}
        names = {name for wanted in weights.values() for patch in wanted for name in patch.tensors.values()}
        number = next(self._numbers) if patches.weights else 0
        self.doubt()
        return number, Change(number, base, weights, {name: patches.tensors[name] for name in names})

    def confirm(self, change: Change, patches: WeightPatches) -> None:
        """The workers have made the change, to these patches."""
        self._weights = _Weights(self._weights.model, change.number, patches)

    def doubt(self) -> None:
        """Any patches may be in the weights: all are sent anew."""
        self._weights = _Weights(self._weights.model, None, NO_PATCHES)

    def unload(self) -> None:
        """The workers drop the model."""
        self._weights = _Weights(None, 0, NO_PATCHES)
