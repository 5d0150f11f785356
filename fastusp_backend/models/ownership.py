"""Which rank has which of a model's tensors: each modulation layer has one owner, all else lies on every rank.

Modulations are a quarter to a third of a model and used once a prompt, so that one gather of their outputs is cheap;
every other weight is used in every step, and would have to travel in each. Layers stay whole, so that formats, scales,
patches and reading know nothing of it: a cut by rows would have to respect each format's blocks and scales.
"""

from collections.abc import Sequence

from ..weights.storage_plan import StoragePlan
from .family import Transformer


class Ownership:
    """Where the tensors of a model lie among `ranks` ranks; the same on all of them.

    plans: as `files.storage_plans` gives them.
    owners: the rank of each of `model.modulations()`.
    nbytes: bytes of each rank's tensors once they are loaded.
    """

    def __init__(self, model: Transformer, plans: dict[str, StoragePlan], ranks: int):
        names = {module: name for name, module in model.named_modules()}
        layers = [[f"{names[layer]}.{leaf}" for leaf, _ in layer.named_parameters()] for layer in model.modulations()]
        self.owners = balanced([sum(plans[name].nbytes for name in layer) for layer in layers], ranks)
        self._owner = {name: owner for layer, owner in zip(layers, self.owners, strict=True) for name in layer}
        self.nbytes = [
            sum(plan.nbytes for name, plan in plans.items() if self._owner.get(name, rank) == rank)
            for rank in range(ranks)
        ]

    def owner(self, name: str) -> int | None:
        """The rank on which alone a tensor lies; None where it lies on all."""
        return self._owner.get(name)


def balanced(sizes: Sequence[int], ranks: int) -> list[int]:
    """An owner for each size, so that all own about as much: the largest first, each to the rank that has least."""
    loads, owners = [0] * ranks, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners
