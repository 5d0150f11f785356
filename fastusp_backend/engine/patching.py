"""Patches in the weights of a resident model, and their exact undoing.

A patched weight keeps its place in memory: CUDA graphs hold its address. It is undone by reading it from the file
again, so that rounding leaves no trace. One that was rounded to fp8 when it was read is patched from the file's values:
most of a LoRA's small differences would vanish if they were added to values of fp8 and rounded again. A packed weight
stays as it is: the factors of its LoRAs lie beside it, and are added where it is unpacked for use. One whose
shape changes gets another place, and the model the config that goes with it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch

from ..config import WeightPatch
from ..errors import PatchesLost, RequestError
from ..pulse import beat
from ..weights import adapters
from ..weights.stored import Stored
from .loading import Checkpoint

Patches = Mapping[str, Sequence[WeightPatch]]
"""By weight, in its file's name."""


class PatchedWeights:
    """How the weights of a checkpoint's model, which was read, differ from those of its file. All ranks check all
    patches, keep the same account of them, and change the weights that they hold.

    number: the patch set they hold; 0 for none, None while they change and after that failed. before_moving: called
    before a weight gets another shape or factors beside packed weights come or go: CUDA graphs hold their addresses.
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
        patched = [name for name, patches in wanted.items() if patches]
        rounded = [name for name in patched if checkpoint.rounded(name)]
        restored = [name for name in self._patched if name in wanted or base is None]
        packed = [name for name in dict.fromkeys([*patched, *restored]) if checkpoint.held(name).packing]
        widened = [name for name in patched if name not in rounded and shapes[name] != checkpoint.infos[name].shape]
        elsewhere = {name for name in (*restored, *patched) if not checkpoint.here(name)}
        again = [name for name in restored if name not in {*rounded, *packed, *widened}]
        again = checkpoint.reread(again) if again else ()
        anew = checkpoint.file_values(rounded) if rounded else ()
        unwidened = checkpoint.reread(widened) if widened else ()
        self.number = None
        if packed:
            self._move_factors(packed, wanted, tensors)
        self._patched = self._patched - elsewhere | elsewhere.intersection(patched)
        for name, stored in again:
            self._place(name, stored.data.shape).restore(stored)
            beat()
            self._patched.remove(name)
        done = {*rounded, *packed, *widened, *elsewhere}
        values = ((name, checkpoint.held(name).dequantise()) for name in patched if name not in done)
        for name, weight in chain(values, anew, ((name, stored.dequantise()) for name, stored in unwidened)):
            self._patched.add(name)
            for patch in wanted[name]:
                weight = adapters.apply(weight, patch, tensors)
            self._place(name, weight.shape).store(weight)
            beat()
        if again or anew or unwidened:
            checkpoint.check_file()
        self.number = number
        return len(restored), len(patched)

    def _check(self, name: str, patches: Sequence[WeightPatch], tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
        """The shape that the patches give a weight."""
        if name not in self._checkpoint.infos:
            raise RequestError(f"the model has no weight {name!r} to patch")
        shape = had = tuple(self._checkpoint.infos[name].shape)
        for patch in patches:
            shape = adapters.check(patch, tensors, shape)
        if patches and self._checkpoint.held(name).packing:
            self._low_rank(name, patches, tensors, torch.device("meta"))
        if shape != had and self._config.reshaped(name, shape) is None:
            raise RequestError(f"the model's weight {name!r} cannot be widened from {had} to {shape}")
        return shape

    def _place(self, name: str, shape: tuple[int, ...]) -> Stored:
        """Where a weight of `shape` lies: where it lay, or a new place if it had another shape."""
        checkpoint, held = self._checkpoint, self._checkpoint.held(name)
        if held.data.shape != shape:
            self._before_moving()
            checkpoint.give(name, replace(held, data=held.data.new_empty(shape)))
            checkpoint.model.config = self._config.reshaped(name, shape)
        return checkpoint.held(name)

    def _move_factors(self, packed: Sequence[str], wanted: Patches, tensors: Mapping[str, torch.Tensor]) -> None:
        self._before_moving()
        layers = {name: self._checkpoint.model.get_submodule(name.rpartition(".")[0]) for name in packed}
        for layer in layers.values():
            layer.low_rank = None
        self._patched -= layers.keys()
        for name, layer in layers.items():
            if wanted.get(name):
                self._patched.add(name)
                layer.low_rank = self._low_rank(name, wanted[name], tensors, layer.weight.device)
                beat()

    def _low_rank(self, name: str, patches: Sequence[WeightPatch], tensors, device: torch.device):
        dtype = getattr(torch, self._checkpoint.spec.compute)
        return adapters.low_rank(patches, tensors, self._checkpoint.infos[name].shape, dtype=dtype, device=device)
