"""Which rank holds which of a model's tensors, and how.

All ranks hold all of them but the modulations' weights, a quarter to a third of a model, which are used once a prompt:
each of those layers has one owner. Whole layers, so that formats, scales, patches and the file know nothing of it.
"""

from collections.abc import Sequence

import torch

from ..config import ModelSpec
from ..weights.checkpoint import TensorInfo
from ..weights.stored import conversion_bytes, keeps
from .detection import detect
from .family import Transformer
from .layers import Linear


def by_module(model: Transformer, header: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors that a model needs, by the module's names. header: by the file's, as `files.read_model` gives it."""
    return {model.module_key(key): info for key, info in header.items()}


class Holding:
    """How `ranks` ranks hold a model of `spec` whose tensors `infos` lie in its file, both by the module's names; the
    same on all of them.

    owners: the rank that holds each of `model.modulations()`. nbytes: of each rank's tensors once they are loaded.
    """

    def __init__(self, model: Transformer, infos: dict[str, TensorInfo], spec: ModelSpec, ranks: int):
        self._model, self._infos, self._spec = model, infos, spec
        self._by_rows = set(model.products()) if spec.linear == "fp8" else set()
        names = {module: name for name, module in model.named_modules()}
        own = [[f"{names[layer]}.{leaf}" for leaf in ("weight", "bias")] for layer in model.modulations()]
        layers = [[name for name in layer if name in infos] for layer in own]  # some have no bias
        sizes = {name: self._held_bytes(name) for name in infos}
        self.owners = balanced([sum(sizes[name] for name in layer) for layer in layers], ranks)
        self._owner = {name: owner for layer, owner in zip(layers, self.owners, strict=True) for name in layer}
        self.nbytes = [
            sum(size for name, size in sizes.items() if self._owner.get(name, rank) == rank) for rank in range(ranks)
        ]

    def owner(self, name: str) -> int | None:
        """The rank that alone holds a tensor; None where all do."""
        return self._owner.get(name)

    def use(self, name: str) -> dict[str, bool]:
        """How the model uses a tensor, as `weights.stored` asks: whether it is a linear layer's weight (matrix), and
        one that products in fp8 take (by_rows)."""
        layer, matrix = self._model.get_submodule(name.rpartition(".")[0]), self.is_matrix(name)
        return {"matrix": matrix, "by_rows": matrix and layer in self._by_rows}

    def is_matrix(self, name: str) -> bool:
        """Whether a tensor is the weight of a linear layer."""
        path, _, leaf = name.rpartition(".")
        return leaf == "weight" and isinstance(self._model.get_submodule(path), Linear)

    def _held_bytes(self, name: str) -> int:
        info, use = self._infos[name], self.use(name)
        if keeps(info, self._spec, **use):
            return info.size + (0 if info.scale is None else torch.float32.itemsize)
        return conversion_bytes(info, self._spec, **use)[0]


def balanced(sizes: Sequence[int], ranks: int) -> list[int]:
    """An owner for each size, so that all own about as much: the largest first, each to the rank that has least."""
    loads, owners = [0] * ranks, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners


def rank_bytes(header: dict[str, TensorInfo], spec: ModelSpec, ranks: int) -> int:
    """The most that one of `ranks` ranks holds of a file's weights once they are loaded. header: as of `by_module`."""
    with torch.device("meta"):
        model = detect(header, spec.path).build()
    return max(Holding(model, by_module(model, header), spec, ranks).nbytes)
