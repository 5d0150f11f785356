"""A file as `plan` has it."""

from dataclasses import dataclass

import msgspec

from ..config import ModelSpec
from ..engine.room import CONTEXT, Room, kept_free, settle
from ..models.family import FamilyConfig
from ..models.files import model_and_plans
from ..models.placement import Placement, place_file
from ..weights.tensor_info import TensorInfo


@dataclass(frozen=True, slots=True)
class File:
    """What a file holds, and how it would be loaded."""

    header: dict[str, TensorInfo]
    config: FamilyConfig
    spec: ModelSpec

    def whole(self, ranks: int, linear: str) -> Placement:
        """As the file has its weights, whole."""
        return place_file(self.header, msgspec.structs.replace(self.spec, weights="whole", linear=linear), ranks)

    def settle(self, ranks: int, linear: str, free: int, *, peers: bool) -> tuple[Placement, int]:
        """What `auto` makes of so many bytes of each GPU, and how many are kept for all else. Raises as
        `room.settle`."""
        spec = msgspec.structs.replace(self.spec, linear=linear, unpack=self.spec.keep_quantised)
        model, plans = model_and_plans(self.header, spec)
        settled = settle(model, plans, spec, ranks, Room(peers, free - CONTEXT))
        return settled.placement, kept_free(self.config, settled.plans.values(), ranks).usual + CONTEXT
