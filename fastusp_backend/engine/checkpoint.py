"""From a file to a module on a device, in two steps that ranks agree on: what can be refused, then the reading.

Tensors that `models/ownership.py` gives to other ranks stay on the meta device, in the form that they have there.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from ..config import ModelSpec
from ..models.family import Transformer
from ..models.files import read_model, storage_plans
from ..models.ownership import Ownership
from ..pulse import beat
from ..weights.reading import Shares, map_tensors, read_tensors, room
from ..weights.stored import Stored
from ..weights.tensor_info import TensorInfo


class Checkpoint:
    """The model of a file: described when it is made, still without weights.

    source: the file, open as long as this lives.
    model: the transformer.
    plans: in which form its tensors lie in memory, by the module's names.
    ownership: on which ranks they lie; this is `rank` of `ranks`.

    Raises CheckpointError when the file is unusable or was replaced after the client looked at it.
    """

    def __init__(self, spec: ModelSpec, rank: int = 0, ranks: int = 1):
        self.spec = spec
        file = read_model(spec.path, spec.file)
        self.source = file.source
        self.model, self.plans = file.model, storage_plans(file.model, file.header, spec)
        self.ownership, self._rank = Ownership(self.model, self.plans, ranks), rank
        self._shares = Shares()
        self._device = torch.device("cpu")
        self._rooms: dict[str, torch.Tensor] = {}

    def allocate(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        """Makes room for the weights on a GPU; raises what torch raises where there is none. CPU ranks need none: they
        map the file.

        Weights that are converted get their room when they are read: it is tried here, with what the largest
        conversion takes, and given back to torch's allocator, which has it ready then.

        group: the ranks that share the reading of what all hold, each on a GPU of its own.
        """
        self._device, self._shares = device, Shares(group)
        if device.type != "cpu":
            plans = {name: plan for name, plan in self.plans.items() if self.here(name)}
            for name, plan in plans.items():
                if plan.unchanged:
                    self._rooms[name] = self._shares_of(name).allocate(plan.info, device)
            tried = [room(plan.nbytes, device) for plan in plans.values() if not plan.unchanged]
            tried.append(room(max((plan.conversion_bytes for plan in plans.values()), default=0), device))
            del tried

    def read(self) -> Transformer:
        """Gives the model its weights. Collective over the group: a rank that fails here alone leaves the others
        waiting.

        Raises CheckpointError when the file cannot be read to its end.
        """
        shared, own = {}, {}
        for name, plan in self.plans.items():
            owner = self.ownership.owner(name)
            if self.here(name):
                (shared if owner is None else own)[name] = plan.info
            else:
                self.give(name, plan.elsewhere())
        parts = [(shared, self._shares), (own, Shares())]
        if self._shares.ranks == 1:
            parts = [(shared | own, self._shares)]  # in one go
        for infos, shares in parts:
            for name, raw in self._read(infos, self._rooms, shares):
                self.give(name, self.plans[name].load(raw))
                beat()
        self._rooms = {}
        return self.model.eval()

    def check_file(self) -> None:
        """Raises CheckpointError when the file was written to since it was opened. One that was replaced or removed is
        still read as it was."""
        self.source.check("since it was loaded")

    def here(self, name: str) -> bool:
        """Whether this rank holds a tensor."""
        return self.ownership.owner(name) in (None, self._rank)

    def reread(self, names: Iterable[str]) -> Iterator[tuple[str, Stored]]:
        """Some tensors, by the module's names, as `read` gave them to the model; those alone that this rank holds. Each
        rank reads for itself.

        Raises CheckpointError when the file was written to meanwhile.
        """
        return ((name, self.plans[name].load(raw)) for name, raw in self._reread(names))

    def file_values(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The values in float32 that some tensors have in the file. Otherwise as `reread`."""
        return ((name, Stored.in_file(raw, self.plans[name].info).dequantise()) for name, raw in self._reread(names))

    def held(self, name: str) -> Stored:
        """A tensor of the model, by the module's name, as it lies in memory, here or on another rank."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        return module.stored if self.plans[name].linear else Stored(getattr(module, leaf))

    def give(self, name: str, stored: Stored) -> None:
        """Makes this a tensor of the model, by the module's name."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if self.plans[name].linear:
            module.stored = stored
        else:
            setattr(module, leaf, nn.Parameter(stored.data, requires_grad=False))

    def _read(self, infos: dict[str, TensorInfo], rooms: dict[str, torch.Tensor], shares: Shares):
        if self._device.type == "cpu":
            return zip(infos, map_tensors(self.source, list(infos.values())), strict=True)
        return read_tensors(self.source, infos, rooms, shares, self._device)

    def _reread(self, names: Iterable[str]):
        names = list(names)
        if names:
            self.check_file()
        return self._read({name: self.plans[name].info for name in names if self.here(name)}, {}, Shares())

    def _shares_of(self, name: str) -> Shares:
        return self._shares if self.ownership.owner(name) is None else Shares()
