"""Patches in the weights of a resident model, and their exact undoing.

A patched weight keeps its place in memory: CUDA graphs hold its address. It is undone by reading it from the file
again, so that rounding leaves no trace: subtracting the patch would leave one, and a copy of each patched weight would
take a model's memory again. One that was rounded to fp8 when it was read is patched from the file's values:
most of a LoRA's small differences would vanish if they were added to values of fp8 and rounded again. A packed weight
stays as it is: the factors of its LoRAs lie beside it, and are added where it is unpacked for use. What was unpacked as
it was read is patched in the form that it had otherwise, and unpacked again, so that a picture does not depend on the
room that there was. One whose shape changes gets another place, and the model the config that goes with it.

A change first plans how each weight is updated (`plan_update`), while it can still be refused; then factors are set,
weights restored, and patches applied, in this order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Literal

import torch

from ..config import WeightPatch
from ..errors import PatchesLost, RequestError
from ..pulse import beat
from ..weights import adapters
from ..weights.storage_plan import StoragePlan
from ..weights.stored import Stored
from .checkpoint import Checkpoint

Patches = Mapping[str, Sequence[WeightPatch]]
"""By weight, in its file's name."""

Update = Literal["factors", "restore", "in_place", "reapply", "from_file", "widen", "unpack"]
"""How a weight gets its patches or loses them:

factors: a packed weight stays as it is; the patches' factors beside it are set or taken away.
restore: it is read from the file again.
in_place: patches change the values in memory.
reapply: it is restored, then changed in place.
from_file: patches change the file's values, since those in memory were rounded to fp8.
widen: patches change the values as loading gives them, which then take another place.
unpack: patches change the form that it has in the file, whose values it takes then.
"""


def plan_update(plan: StoragePlan, shape: tuple[int, ...] | None, *, patched: bool) -> Update:
    """How a weight is updated whose patches give it `shape`; None where it is to have none.

    patched: whether it has patches now.
    The same on all ranks, also on those without the weight: together they drop graphs, or refuse a file that was
    written to.
    """
    if plan.packing:
        return "factors"
    if shape is None:
        return "restore"
    if plan.small is not None:
        return "unpack"
    if plan.rounded_to_fp8:
        return "from_file"
    if shape != plan.info.shape:
        return "widen"
    return "reapply" if patched else "in_place"


def _updated_by(updates: Mapping[str, Update], *some: Update) -> list[str]:
    return [name for name, update in updates.items() if update in some]


class PatchedWeights:
    """How the weights of a checkpoint's model, which was read, differ from those of its file. All ranks check all
    patches, keep the same account of them, and change the weights that lie on them.

    number: the patch set that is in the weights; 0 for none, None while they change and after that failed.
    before_moving: called before a weight gets another shape or factors beside packed weights come or go: CUDA graphs
    hold their addresses.
    """

    def __init__(self, checkpoint: Checkpoint, before_moving: Callable[[], None] = lambda: None):
        self.number: int | None = 0
        self._checkpoint = checkpoint
        self._config = checkpoint.model.config
        self._before_moving = before_moving
        self._patched: set[str] = set()

    @torch.no_grad()
    def change(
        self, weights: Patches, tensors: Mapping[str, torch.Tensor], *, base: int | None, number: int
    ) -> tuple[int, int]:
        """See `protocol.Patch`. Returns how many weights were restored and how many patched.

        Raises PatchesLost, RequestError or, where the file was written to, CheckpointError before anything has changed;
        the last one also where that happens meanwhile.
        """
        if base is not None and base != self.number:
            raise PatchesLost(f"the weights do not hold patch set {base}")
        checkpoint, wanted = self._checkpoint, {}
        for key, patches in weights.items():
            wanted.setdefault(checkpoint.model.module_key(key), []).extend(patches)  # some weights have two names
        shapes = {name: self._check(name, patches, tensors) for name, patches in wanted.items()}
        before = {name for name in self._patched if name in wanted or base is None}
        after = {name for name, patches in wanted.items() if patches}
        updates = {
            name: plan_update(plan, shapes[name] if name in after else None, patched=name in before)
            for name, plan in checkpoint.plans.items()
            if name in before or name in after
        }
        with checkpoint.changing():
            self._change(updates, wanted, tensors, after)
        self._patched -= before - after
        self.number = number
        return len(before), len(after)

    def _change(self, updates: Mapping[str, Update], wanted: Patches, tensors, after: set[str]) -> None:
        """Updates the weights that lie on this rank. after: those that are patched then."""
        checkpoint = self._checkpoint
        restored = checkpoint.reread(_updated_by(updates, "restore", "reapply"))
        from_file = checkpoint.file_values(_updated_by(updates, "from_file"))
        to_widen = checkpoint.reread(_updated_by(updates, "widen"))
        to_unpack = checkpoint.reread_small(_updated_by(updates, "unpack"))
        self.number = None
        self._patched |= after  # so that all of it is undone if a part fails
        self._set_factors(_updated_by(updates, "factors"), wanted, tensors)
        for name, stored in restored:
            checkpoint.open(name)
            self._place(name, stored.data.shape).restore(stored)
            beat()
        in_place = filter(checkpoint.is_local, _updated_by(updates, "in_place", "reapply"))
        for name, weight in chain(
            ((name, checkpoint.open(name).dequantise()) for name in in_place),
            from_file,
            ((name, stored.dequantise()) for name, stored in to_widen),
        ):
            for patch in wanted[name]:
                weight = adapters.apply(weight, patch, tensors)
            checkpoint.open(name)
            self._place(name, weight.shape).store(weight)
            beat()
        for name, small in to_unpack:
            values = self._patched_small(name, small, wanted[name], tensors).values(
                getattr(torch, checkpoint.spec.compute)
            )
            checkpoint.open(name)
            self._place(name, values.shape).data.copy_(values)
            beat()
        if _updated_by(updates, "restore", "reapply", "from_file", "widen", "unpack"):
            checkpoint.check_file()

    def _check(self, name: str, patches: Sequence[WeightPatch], tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
        """The shape that the patches give a weight."""
        if name not in self._checkpoint.plans:
            raise RequestError(f"the model has no weight {name!r} to patch")
        shape = had = tuple(self._checkpoint.plans[name].info.shape)
        for patch in patches:
            shape = adapters.check(patch, tensors, shape)
        if patches and self._packing(name):
            self._low_rank(name, patches, tensors, torch.device("meta"))
        if shape != had and self._config.reshaped(name, shape) is None:
            raise RequestError(f"the model's weight {name!r} cannot be widened from {had} to {shape}")
        return shape

    def _packing(self, name: str) -> str:
        plan = self._checkpoint.plans[name]
        return (plan.small or plan).packing

    def _patched_small(self, name: str, small: Stored, patches: Sequence[WeightPatch], tensors) -> Stored:
        """A weight in the form of its file, patched as one that stayed so would be."""
        if small.packing:
            small.low_rank = self._low_rank(name, patches, tensors, small.data.device)
            return small
        weight = small.dequantise()
        for patch in patches:
            weight = adapters.apply(weight, patch, tensors)
        if weight.shape != small.data.shape:
            small = replace(small, data=small.data.new_empty(weight.shape))
        small.store(weight)
        return small

    def _place(self, name: str, shape: tuple[int, ...]) -> Stored:
        """Where a weight of `shape` lies: where it lay, or a new place if it had another shape."""
        checkpoint, stored = self._checkpoint, self._checkpoint.stored(name)
        if stored.data.shape != shape:
            self._before_moving()
            checkpoint.set_stored(name, replace(stored, data=stored.data.new_empty(shape)))
            checkpoint.model.config = self._config.reshaped(name, shape)
        return checkpoint.stored(name)

    def _set_factors(self, names: Sequence[str], wanted: Patches, tensors: Mapping[str, torch.Tensor]) -> None:
        """Gives packed weights the factors that are wanted of them, none to the others; all old ones go first."""
        if not names:
            return
        self._before_moving()
        layers = {name: self._checkpoint.model.get_submodule(name.rpartition(".")[0]) for name in names}
        for layer in layers.values():
            layer.low_rank = None
        for name, layer in layers.items():
            if wanted.get(name):
                layer.low_rank = self._low_rank(name, wanted[name], tensors, layer.weight.device)
                beat()

    def _low_rank(self, name: str, patches: Sequence[WeightPatch], tensors, device: torch.device):
        dtype = getattr(torch, self._checkpoint.spec.compute)
        return adapters.low_rank(patches, tensors, self._checkpoint.plans[name].info.shape, dtype=dtype, device=device)
