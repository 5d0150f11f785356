"""From a file to a module on a device, in two steps that ranks agree on: what can be refused, then the reading."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from ..config import ModelSpec
from ..errors import CheckpointError
from ..models.detection import detect
from ..models.family import Transformer
from ..models.layers import Linear
from ..weights.checkpoint import TensorInfo, read_header
from ..weights.headers import FP8
from ..weights.reading import Shares, map_tensors, read_tensors, room
from ..weights.stored import Stored, conversion_bytes, hold, in_file, keeps


def check_tensors(model: Transformer, header: dict[str, TensorInfo], path: str) -> dict[str, TensorInfo]:
    """Compares a file's tensors with what the model needs; returns them by the module's names.

    Raises CheckpointError naming what is missing, left over or of another shape.
    """
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    keys = {key: model.module_key(key) for key in header}
    names = set(keys.values())
    problems = [f"tensor {name!r} is missing" for name in sorted(wanted.keys() - names)]
    problems += [f"tensor {key!r} is unknown" for key, name in keys.items() if name not in wanted]
    problems += [
        f"tensor {key!r} is {header[key].shape}, expected {wanted[name]}"
        for key, name in keys.items()
        if name in wanted and header[key].shape != wanted[name]
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{path} is no complete {type(model).__name__} file: {'; '.join(problems[:3])}{more}")
    return {keys[key]: info for key, info in header.items()}


def check_unchanged(spec: ModelSpec) -> None:
    """Raises CheckpointError when a file is not the one that the client looked at."""
    now = ModelSpec.of_file(spec.path, storage=spec.storage, compute=spec.compute)
    if (now.mtime_ns, now.size) != (spec.mtime_ns, spec.size):
        raise CheckpointError(f"{spec.path} was replaced since this workflow loaded it; run the prompt again")


class Checkpoint:
    """The model of a file: described when it is made, still without weights.

    model: the transformer. infos: the file's tensors by the module's names. Raises CheckpointError when the file is
    unusable or was replaced after the client looked at it.
    """

    def __init__(self, spec: ModelSpec):
        check_unchanged(spec)
        self.spec = spec
        header = read_header(spec.path)
        with torch.device("meta"):
            self.model = detect(header, spec.path).build()
        self.infos = check_tensors(self.model, header, spec.path)
        self._by_rows = set(self.model.products()) if spec.linear == "fp8" else set()
        self._shares = Shares()
        self._device = torch.device("cpu")
        self._rooms: dict[str, torch.Tensor] = {}

    def allocate(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        """Makes room for the weights on a GPU; raises what torch raises where there is none. CPU ranks need none: they
        map the file.

        Weights that are converted get their room when they are read: it is tried here, with what the largest
        conversion takes, and given back to torch's allocator, which has it ready then.

        group: the ranks that share the reading, each on a GPU of its own.
        """
        self._device, self._shares = device, Shares(group)
        if device.type != "cpu":
            kept = [name for name, info in self.infos.items() if keeps(info, self.spec, **self._use(name))]
            self._rooms = {name: self._shares.allocate(self.infos[name], device) for name in kept}
            converted = [
                conversion_bytes(info, self.spec, **self._use(name))
                for name, info in self.infos.items()
                if name not in self._rooms
            ]
            tried = [room(held, device) for held, _ in converted]
            tried.append(room(max((passing for _, passing in converted), default=0), device))
            del tried

    def read(self) -> Transformer:
        """Gives the model its weights. Collective over the group: a rank that fails here alone leaves the others
        waiting.

        Raises CheckpointError when the file cannot be read to its end.
        """
        for name, raw in self._read(self.infos, self._rooms, self._shares):
            stored = self._hold(name, raw)
            path, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(path)
            if self._is_matrix(name):
                owner.stored = stored
            else:
                setattr(owner, leaf, nn.Parameter(stored.data, requires_grad=False))
        self._rooms = {}
        return self.model.eval()

    def reread(self, names: Iterable[str]) -> Iterator[tuple[str, Stored]]:
        """Some tensors, by the module's names, as `read` gave them to the model. Each rank reads for itself.

        Raises CheckpointError when the file was replaced meanwhile.
        """
        return ((name, self._hold(name, raw)) for name, raw in self._reread(names))

    def rounded(self, name: str) -> bool:
        """Whether a tensor was rounded to fp8 when it was read."""
        return self.held(name).data.dtype in FP8 and not keeps(self.infos[name], self.spec, **self._use(name))

    def file_values(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The values in float32 that some tensors have in the file. Otherwise as `reread`."""
        return ((name, in_file(raw, self.infos[name]).dequantise()) for name, raw in self._reread(names))

    def held(self, name: str) -> Stored:
        """A tensor of the model, by the module's name, as it lies in memory."""
        path, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(path)
        return owner.stored if self._is_matrix(name) else Stored(getattr(owner, leaf))

    def _read(self, infos: dict[str, TensorInfo], rooms: dict[str, torch.Tensor], shares: Shares):
        if self._device.type == "cpu":
            return zip(infos, map_tensors(self.spec.path, list(infos.values())), strict=True)
        return read_tensors(self.spec.path, infos, rooms, shares, self._device)

    def _reread(self, names: Iterable[str]):
        check_unchanged(self.spec)
        return self._read({name: self.infos[name] for name in names}, {}, Shares())

    def _hold(self, name: str, raw: torch.Tensor) -> Stored:
        return hold(raw, self.infos[name], self.spec, **self._use(name))

    def _use(self, name: str) -> dict[str, bool]:
        """What `hold` needs to know of a tensor beside its file's facts."""
        owner = self.model.get_submodule(name.rpartition(".")[0])
        matrix = self._is_matrix(name)
        return {"matrix": matrix, "by_rows": matrix and owner in self._by_rows}

    def _is_matrix(self, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        return leaf == "weight" and isinstance(self.model.get_submodule(path), Linear)


def load_model(spec: ModelSpec, device: torch.device) -> Transformer:
    """Reads the checkpoint of `spec` onto `device`, alone. Raises as `Checkpoint`."""
    checkpoint = Checkpoint(spec)
    checkpoint.allocate(device)
    return checkpoint.read()
