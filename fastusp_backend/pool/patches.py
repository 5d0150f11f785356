"""Weight patches (LoRA), as a session has them."""

from dataclasses import dataclass, field

import torch

from ..config import WeightPatch
from ..prompt import Tensors


@dataclass(frozen=True, eq=False)
class WeightPatches:
    """Patches of a model's weights.

    weights: weight's name in the file -> its patches, in order.
    tensors: the tensors that these name.

    A tensor is named after its identity (see `name_of`), so that equal patches have equal tensors.
    """

    weights: dict[str, tuple[WeightPatch, ...]] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)


NO_PATCHES = WeightPatches()


def name_of(tensor: torch.Tensor) -> str:
    """A name that no other tensor has while this one lives."""
    return f"{id(tensor):x}"
