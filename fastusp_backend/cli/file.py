"""A file as `plan` has it."""

from dataclasses import dataclass, field

import msgspec

from ..config import ModelSpec
from ..engine.room import CONTEXT, Room, kept_free, settle
from ..models.family import FamilyConfig, Transformer
from ..models.files import model_and_plans
from ..models.placement import Placement, place_file
from ..weights.storage_plan import StoragePlan
from ..weights.tensor_info import TensorInfo


@dataclass(frozen=True, slots=True)
class File:
    """What a file holds, and how it would be loaded."""

    header: dict[str, TensorInfo]
    config: FamilyConfig
    spec: ModelSpec
    _forms: dict[str, tuple[Transformer, dict[str, StoragePlan], ModelSpec]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """By `linear`: the model, its weights' forms, the spec that has it. A plan's table asks for them in each cell."""

    def whole(self, ranks: int, linear: str) -> Placement:
        """As the file has its weights, whole."""
        return place_file(self.header, msgspec.structs.replace(self.spec, weights="whole", linear=linear), ranks)

    def settle(self, ranks: int, linear: str, free: int, *, peers: bool) -> tuple[Placement, int]:
        """What `auto` makes of so many bytes of each GPU, and how many are kept for all else. Raises as
        `room.settle`."""
        if linear not in self._forms:
            spec = msgspec.structs.replace(self.spec, linear=linear, unpack=self.spec.keep_quantised)
            self._forms[linear] = *model_and_plans(self.header, spec), spec
        model, plans, spec = self._forms[linear]
        settled = settle(model, plans, spec, ranks, Room(peers, free - CONTEXT))
        return settled.placement, kept_free(self.config, settled.plans.values(), ranks).usual + CONTEXT
