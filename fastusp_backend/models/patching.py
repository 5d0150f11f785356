"""Patches in the weights of a resident model, and their exact undoing.

A patched weight keeps its place in memory: CUDA graphs hold its address. It is undone by reading it from the file
again, so that rounding leaves no trace.
"""

from collections.abc import Mapping, Sequence

import torch

from ..config import WeightPatch
from ..errors import PatchesLost, RequestError
from . import adapters
from .loading import Checkpoint

Patches = Mapping[str, Sequence[WeightPatch]]
"""By weight, in its file's name."""


class PatchedWeights:
    """How the weights of a checkpoint's model, which was read, differ from those of its file.

    number: the patch set they hold; 0 for none, None while they change and after that failed.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.number: int | None = 0
        self._checkpoint = checkpoint
        self._patched: set[str] = set()

    @torch.no_grad()
    def change(
        self, weights: Patches, tensors: Mapping[str, torch.Tensor], *, base: int | None, number: int
    ) -> tuple[int, int]:
        """See `protocol.Patch`. Returns how many weights were restored and how many patched.

        Raises PatchesLost, RequestError or, where the file was replaced, CheckpointError before anything has changed.
        """
        if base is not None and base != self.number:
            raise PatchesLost(f"the weights do not hold patch set {base}")
        checkpoint, wanted = self._checkpoint, {}
        for key, patches in weights.items():
            wanted.setdefault(checkpoint.model.module_key(key), []).extend(patches)  # some weights have two names
        for name, patches in wanted.items():
            self._check(name, patches, tensors)
        restored = [name for name in self._patched if name in wanted or base is None]
        again = checkpoint.reread(restored) if restored else ()
        self.number = None
        for name, stored in again:
            checkpoint.held(name).restore(stored)
            self._patched.remove(name)
        for name, patches in wanted.items():
            if patches:
                self._patched.add(name)
                held = checkpoint.held(name)
                weight = held.dequantise()
                for patch in patches:
                    adapters.apply(weight, patch, tensors)
                held.store(weight)
        self.number = number
        return len(restored), sum(bool(patches) for patches in wanted.values())

    def _check(self, name: str, patches: Sequence[WeightPatch], tensors: Mapping[str, torch.Tensor]) -> None:
        if name not in self._checkpoint.infos:
            raise RequestError(f"the model has no weight {name!r} to patch")
        for patch in patches:
            adapters.check(patch, tensors, self._checkpoint.infos[name].shape)
        if patches:
            self._checkpoint.held(name).check_stores()
