"""Patches in the weights of a resident model, and their exact undoing.

A patched weight keeps its place in memory: CUDA graphs hold its address. It is undone by reading it from the file
again, so that rounding leaves no trace. What depends on how weights are stored is in the three functions at the end.
"""

from collections.abc import Mapping, Sequence

import torch

from ..config import ModelSpec, WeightPatch
from ..errors import CheckpointError, PatchesLost, RequestError
from . import adapters
from .checkpoint import read_tensors
from .family import Transformer

Patches = Mapping[str, Sequence[WeightPatch]]
"""By weight, in its file's name."""


class PatchedWeights:
    """How the weights of `model` differ from those of its file. keys: file key -> module key.

    number: the patch set they hold; 0 for none, None while they change and after that failed.
    """

    def __init__(self, model: Transformer, keys: dict[str, str], spec: ModelSpec):
        self.number: int | None = 0
        self._module_key, self._spec = model.module_key, spec
        self._parameters = dict(model.named_parameters())
        self._file_keys = {name: key for key, name in keys.items()}
        self._patched: set[str] = set()

    @torch.no_grad()
    def change(
        self, weights: Patches, tensors: Mapping[str, torch.Tensor], *, base: int | None, number: int
    ) -> tuple[int, int]:
        """See `protocol.Patch`. Returns how many weights were restored and how many patched.

        Raises PatchesLost, RequestError or CheckpointError before anything has changed.
        """
        if base is not None and base != self.number:
            raise PatchesLost(f"the weights do not hold patch set {base}")
        wanted: dict[str, list[WeightPatch]] = {}
        for key, patches in weights.items():
            wanted.setdefault(self._module_key(key), []).extend(patches)  # some weights have two names
        for name, patches in wanted.items():
            if name not in self._parameters:
                raise RequestError(f"the model has no weight {name!r} to patch")
            for patch in patches:
                adapters.check(patch, tensors, tuple(self._parameters[name].shape))
        restored = [name for name in self._patched if name in wanted or base is None]
        stored = read_stored(self._spec, [self._file_keys[name] for name in restored])
        self.number = None
        for name in restored:
            restore(self._parameters[name], stored[self._file_keys[name]])
            self._patched.remove(name)
        for name, patches in wanted.items():
            if patches:
                parameter = self._parameters[name]
                self._patched.add(name)
                weight = as_float32(parameter)
                for patch in patches:
                    adapters.apply(weight, patch, tensors)
                store(parameter, weight)
        self.number = number
        return len(restored), sum(bool(patches) for patches in wanted.values())


def read_stored(spec: ModelSpec, keys: list[str]) -> dict[str, torch.Tensor]:
    """Tensors of the file as it has them, mapped, on the CPU. Raises CheckpointError when the file was replaced."""
    if not keys:
        return {}
    if ModelSpec.of_file(spec.path, storage=spec.storage, compute=spec.compute) != spec:
        raise CheckpointError(
            f"{spec.path} was replaced while its weights were patched, so they cannot be restored from it; run the "
            "prompt again from USP Loader"
        )
    return read_tensors(spec.path, keys, torch.device("cpu"), None)


def restore(parameter: torch.Tensor, stored: torch.Tensor) -> None:
    """Gives a parameter the value that it has after loading."""
    parameter.copy_(stored.to(parameter.device).to(parameter.dtype))


def as_float32(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of a stored weight, dequantised."""
    return parameter.to(torch.float32, copy=True)


def store(parameter: torch.Tensor, weight: torch.Tensor) -> None:
    """Rounds float32 values to the nearest that the parameter's type has."""
    parameter.copy_(weight)
