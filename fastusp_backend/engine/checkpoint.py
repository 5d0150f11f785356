"""From a file to a module on a device, in two steps that ranks agree on: what can be refused, then the reading.

An error of one rank in the first step is gathered and refused by all. In the second, ranks with GPUs read together: one
that fails alone leaves the others in a collective, so that all that can fail for lack of memory is tried before.

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
from ..weights.reading import Shares, empty_bytes, map_tensors, read_tensors
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
        self._buffers: dict[str, torch.Tensor] = {}

    def allocate(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        """Allocates the weights on a GPU; raises what torch raises where they do not fit. CPU ranks allocate nothing:
        they map the file.

        Weights that are converted are allocated when they are read: their memory is probed here, with what the largest
        conversion takes, and given back to torch's allocator, which has it ready then.

        group: the ranks that share the reading of what lies on all of them, each on a GPU of its own.
        """
        self._device, self._shares = device, Shares(group)
        if device.type != "cpu":
            plans = {name: plan for name, plan in self.plans.items() if self.is_local(name)}
            for name, plan in plans.items():
                if plan.unchanged:
                    self._buffers[name] = self._shares_of(name).allocate(plan.info, device)
            probes = [empty_bytes(plan.nbytes, device) for plan in plans.values() if not plan.unchanged]
            probes.append(empty_bytes(max((plan.conversion_bytes for plan in plans.values()), default=0), device))
            del probes

    def read(self) -> Transformer:
        """Gives the model its weights. Collective over the group: a rank that fails here alone leaves the others
        waiting.

        Raises CheckpointError when the file cannot be read to its end.
        """
        shared, own = {}, {}
        for name, plan in self.plans.items():
            owner = self.ownership.owner(name)
            if self.is_local(name):
                (shared if owner is None else own)[name] = plan.info
            else:
                self.set_stored(name, plan.elsewhere())
        parts = [(shared, self._shares), (own, Shares())]
        if self._shares.ranks == 1:
            parts = [(shared | own, self._shares)]  # in one go
        for infos, shares in parts:
            for name, raw in self._read(infos, self._buffers, shares):
                self.set_stored(name, self.plans[name].load(raw))
                beat()
        self._buffers = {}
        return self.model.eval()

    def check_file(self) -> None:
        """Raises CheckpointError when the file was written to since it was opened. One that was replaced or removed is
        still read as it was."""
        self.source.check("since it was loaded")

    def is_local(self, name: str) -> bool:
        """Whether a tensor lies on this rank."""
        return self.ownership.owner(name) in (None, self._rank)

    def reread(self, names: Iterable[str]) -> Iterator[tuple[str, Stored]]:
        """Reads some tensors, by the module's names, as `read` gave them to the model; those alone that lie on this
        rank. Each rank reads for itself.

        Raises CheckpointError when the file was written to meanwhile, also where none of them lies here.
        """
        return ((name, self.plans[name].load(raw)) for name, raw in self._reread(names))

    def file_values(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Reads the values, in float32, that some tensors have in the file. Otherwise as `reread`."""
        return ((name, Stored.in_file(raw, self.plans[name].info).dequantise()) for name, raw in self._reread(names))

    def stored(self, name: str) -> Stored:
        """Returns a tensor of the model, by the module's name, as it lies in memory, here or on another rank."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        return module.stored if self.plans[name].linear else Stored(getattr(module, leaf))

    def set_stored(self, name: str, stored: Stored) -> None:
        """Makes this a tensor of the model, by the module's name."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if self.plans[name].linear:
            module.stored = stored
        else:
            setattr(module, leaf, nn.Parameter(stored.data, requires_grad=False))

    def _read(self, infos: dict[str, TensorInfo], buffers: dict[str, torch.Tensor], shares: Shares):
        if self._device.type == "cpu":
            return zip(infos, map_tensors(self.source, list(infos.values())), strict=True)
        return read_tensors(self.source, infos, buffers, shares, self._device)

    def _reread(self, names: Iterable[str]):
        names = list(names)
        if names:
            self.check_file()
        return self._read({name: self.plans[name].info for name in names if self.is_local(name)}, {}, Shares())

    def _shares_of(self, name: str) -> Shares:
        return self._shares if self.ownership.owner(name) is None else Shares()
