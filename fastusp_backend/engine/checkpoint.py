"""From a file to a module on a device, in two steps that ranks agree on: what can be refused, then the reading.

An error of one rank in the first step is gathered and refused by all. In the second, ranks with GPUs read together: one
that fails alone leaves the others in a collective, so that all that can fail for lack of memory is tried before.

Tensors that `models/ownership.py` gives to other ranks stay on the meta device, in the form that they have there.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from ..comm.block_store import BlockStore
from ..config import ModelSpec
from ..library import located
from ..models.family import Transformer
from ..models.files import read_model, storage_plans
from ..models.ownership import Ownership
from ..models.placement import Placement
from ..pulse import beat
from ..weights.reading import Shares, empty_bytes, map_tensors, read_tensors
from ..weights.stored import Stored
from ..weights.tensor_info import TensorInfo
from .block_stream import BlockStream
from .room import Room, settle


class Checkpoint:
    """The model of a file: described when it is made, still without weights.

    source: the file, open as long as this lives.
    model: the transformer.
    plans: in which form its tensors lie in memory, by the module's names.
    ownership: on which ranks they lie; this is `rank` of `ranks`.
    stream: the blocks whose weights do not stay on the device, once it is known which.

    Raises CheckpointError when the file is unusable or was replaced after the client looked at it.
    """

    def __init__(self, spec: ModelSpec, rank: int = 0, ranks: int = 1):
        self.spec = spec
        own = located(spec)
        file = read_model(own.path, own.file)
        self.source = file.source
        self.model, self.plans = file.model, storage_plans(file.model, file.header, spec)
        self.ownership, self._rank, self._ranks = Ownership(self.model, self.plans, ranks), rank, ranks
        self.stream: BlockStream | None = None
        self._shares = Shares()
        self._device = torch.device("cpu")
        self._buffers: dict[str, torch.Tensor] = {}

    def settle(self, room: Room) -> Placement:
        """Decides where the weights will lie. Raises as `room.settle`."""
        self.plans, self.ownership, placement = settle(self.model, self.plans, self.spec, self._ranks, room)
        return placement

    def stream_blocks(self, placement: Placement, store: BlockStore, device: torch.device) -> None:
        """Has blocks' weights come to the device as `placement` says, from `store`. Ahead of `allocate`."""
        self.stream = BlockStream(self.model, placement, self.plans, store, device)
        self.model.stream = self.stream

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
            staying = {name: plan for name, plan in plans.items() if not self.streams(name)}
            for name, plan in staying.items():
                if plan.unchanged:
                    self._buffers[name] = self._shares_of(name).allocate(plan.info, device)
            probes = [empty_bytes(plan.nbytes, device) for plan in staying.values() if not plan.unchanged]
            changed = (plan.reading_bytes for plan in plans.values() if not plan.unchanged)
            probes.append(empty_bytes(max(changed, default=0), device))
            del probes
        if self.stream is not None:
            self.stream.allocate()

    def share(self) -> None:
        """Allocates what the ranks have in common, behind `allocate`, and probes what reading takes beside it.
        Collective; raises OutOfMemoryTogether, or what torch raises where this rank alone lacks memory."""
        if self.stream is None:
            return
        self.stream.share()
        if self._device.type != "cpu":  # each is read, then converted, while the next one is read
            plans = [self.plans[name] for name in self.stream.names if self.is_local(name)]
            taken = (plan.reading_bytes + (0 if plan.unchanged else plan.nbytes) for plan in plans)
            empty_bytes(max(taken, default=0), self._device)  # and free it

    def read(self) -> Transformer:
        """Gives the model its weights. Collective over the group, and over all ranks where blocks are streamed, which
        have their memory then: a rank that fails here alone leaves the others waiting.

        Raises CheckpointError when the file cannot be read to its end.
        """
        shared, own = {}, {}
        for name, plan in self.plans.items():
            if self.is_local(name):
                (shared if self._owner(name) is None else own)[name] = plan.info
            elif not self.streams(name):
                self.set_stored(name, plan.elsewhere())
        parts = [(shared, self._shares), (own, Shares())]
        if self._shares.ranks == 1:
            parts = [(shared | own, self._shares)]  # in one go
        for infos, shares in parts:
            for name, raw in self._read(infos, self._buffers, shares):
                stored = self.plans[name].load(*raw)
                if self.streams(name):
                    self.stream.load(name, stored)
                else:
                    self.set_stored(name, stored)
                beat()
        if self.stream is not None:
            self.stream.meet()
        self._buffers = {}
        return self.model.eval()

    def check_file(self) -> None:
        """Raises CheckpointError when the file was written to since it was opened. One that was replaced or removed is
        still read as it was."""
        self.source.check("since it was loaded")

    def is_local(self, name: str) -> bool:
        """Whether a tensor lies on this rank, where it is read and changed."""
        return self._owner(name) in (None, self._rank)

    def streams(self, name: str) -> bool:
        """Whether a tensor is one of a block that is streamed."""
        return self.stream is not None and name in self.stream

    def _owner(self, name: str) -> int | None:
        """The rank on which alone a tensor lies; None where it lies on all."""
        return self.stream.owner(name) if self.streams(name) else self.ownership.owner(name)

    def reread(self, names: Iterable[str]) -> Iterator[tuple[str, Stored]]:
        """Reads some tensors, by the module's names, as `read` gave them to the model; those alone that lie on this
        rank. Each rank reads for itself.

        Raises CheckpointError when the file was written to meanwhile, also where none of them lies here.
        """
        return ((name, self.plans[name].load(*raw)) for name, raw in self._reread(names))

    def reread_small(self, names: Iterable[str]) -> Iterator[tuple[str, Stored]]:
        """Reads some tensors that were unpacked in the form that they had otherwise (`StoragePlan.small`). Otherwise as
        `reread`."""
        return ((name, self.plans[name].small.load(*raw)) for name, raw in self._reread(names))

    def file_values(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Reads the values, in float32, that some tensors have in the file. Otherwise as `reread`."""
        return (
            (name, Stored.in_file(raw, self.plans[name].info, *scales).dequantise())
            for name, (raw, *scales) in self._reread(names)
        )

    def stored(self, name: str) -> Stored:
        """Returns a tensor of the model, by the module's name, as it lies in memory, here or on another rank."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        return module.stored if self.plans[name].linear else Stored(getattr(module, leaf))

    def open(self, name: str) -> Stored:
        """Returns a tensor that lies on this rank, as `stored`, where it can be read and changed, within `changing`:
        one that is streamed is brought first."""
        if self.stream is not None:
            self.stream.open(name)
        return self.stored(name)

    def changing(self) -> contextlib.AbstractContextManager[None]:
        """Weights may be changed inside: see `BlockStream.changing`."""
        return contextlib.nullcontext() if self.stream is None else self.stream.changing()

    def set_stored(self, name: str, stored: Stored) -> None:
        """Makes this a tensor of the model, by the module's name."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if self.plans[name].linear:
            module.stored = stored
        else:
            setattr(module, leaf, nn.Parameter(stored.data, requires_grad=False))

    def _read(
        self, infos: dict[str, TensorInfo], buffers: dict[str, torch.Tensor], shares: Shares
    ) -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
        """Gives (name, its bytes, and those of its scales where they lie apart) in turn."""
        pieces = {
            name if piece is info else f"{name}, piece {number}": piece
            for name, info in infos.items()
            for number, piece in enumerate(info.pieces)
        }
        return _in_one(self._pieces(pieces, buffers, shares), infos)

    def _pieces(
        self, pieces: dict[str, TensorInfo], buffers: dict[str, torch.Tensor], shares: Shares
    ) -> Iterable[tuple[str, torch.Tensor]]:
        """Gives (name, bytes) of pieces of the file in turn: CPU ranks map them, others read their share of them."""
        if self._device.type == "cpu":
            return zip(pieces, map_tensors(self.source, list(pieces.values())), strict=True)
        return read_tensors(self.source, pieces, buffers, shares, self._device)

    def _reread(self, names: Iterable[str]) -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
        names = list(names)
        if names:
            self.check_file()
        return self._read({name: self.plans[name].info for name in names if self.is_local(name)}, {}, Shares())

    def _shares_of(self, name: str) -> Shares:
        return self._shares if self._owner(name) is None else Shares()


def _in_one(
    read: Iterable[tuple[str, torch.Tensor]], infos: dict[str, TensorInfo]
) -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
    """Puts the pieces of each tensor together, which come one behind the other: parts of its data in one."""
    wanted, pieces = iter(infos.items()), []
    name, info = next(wanted, ("", None))
    for _, raw in read:
        pieces.append(raw)
        if len(pieces) == len(info.pieces):
            if info.parts:
                count = len(info.parts)
                pieces[:count] = [torch.cat(pieces[:count])]
            yield name, tuple(pieces)
            name, info = next(wanted, ("", None))
            pieces = []
