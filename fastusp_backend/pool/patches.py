"""Weight patches (LoRA) that the workers of a pool hold."""

import itertools
import threading
from dataclasses import dataclass, field

import torch

from ..config import ModelSpec, WeightPatch
from ..prompt import Tensors


@dataclass(frozen=True, eq=False)
class WeightPatches:
    """Patches of a model's weights: name in the file -> patches, in order. tensors: those that they name.

    A tensor is named after its identity (see `name_of`), so that equal patches have equal tensors.
    """

    weights: dict[str, tuple[WeightPatch, ...]] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)


NO_PATCHES = WeightPatches()


def name_of(tensor: torch.Tensor) -> str:
    """A name that no other tensor has while this one lives."""
    return f"{id(tensor):x}"


@dataclass(frozen=True, slots=True)
class Change:
    """What `protocol.Patch` says, and the tensors that go with it."""

    number: int
    base: int | None
    weights: dict[str, tuple[WeightPatch, ...]]
    tensors: Tensors


class HeldPatches:
    """Which patch set a pool's workers hold, as far as this client knows: a change is sent once, and of a set that
    resembles the last one the weights that differ."""

    def __init__(self):
        self.lock = threading.RLock()
        """Held from `change` until the request that names the set has ended."""
        self._numbers = itertools.count(1)
        self._where: tuple[int, ModelSpec] | None = None
        self._number: int | None = 0
        self._patches = NO_PATCHES  # keeps the tensors alive, whose identities it is compared by

    def change(self, patches: WeightPatches, model: ModelSpec, epoch: int) -> tuple[int, Change | None]:
        """The number of the set that a request shall name, and what to send first, None for nothing.

        epoch: the pool's. Workers of another epoch, or with another model, are taken to load it as its file is; where
        they do not, they refuse the request.
        """
        if self._where != (epoch, model):
            self._where, self._number, self._patches = (epoch, model), 0, NO_PATCHES
        old = self._patches.weights
        if self._number is not None and old == patches.weights:
            return self._number, None
        weights = {name: wanted for name, wanted in patches.weights.items() if old.get(name) != wanted}
        weights |= {name: () for name in old.keys() - patches.weights.keys()}
        names = {name for wanted in weights.values() for patch in wanted for name in patch.tensors.values()}
        number = next(self._numbers) if patches.weights else 0
        return number, Change(number, self._number, weights, {name: patches.tensors[name] for name in names})

    def made(self, change: Change, patches: WeightPatches) -> None:
        """The workers have answered."""
        self._number, self._patches = change.number, patches

    def forget(self) -> None:
        """The workers may hold anything: all is sent anew."""
        self._number, self._patches = None, NO_PATCHES
