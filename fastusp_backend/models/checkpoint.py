"""Reading safetensors files: the header alone (host, validation), or the tensors, memory-mapped."""

from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError

_TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_header(path: str) -> dict[str, TensorInfo]:
    """Names, shapes and types of the tensors in a file, without reading them.

    Raises CheckpointError for a file that is missing, truncated, corrupt or not in safetensors format.
    """
    with _open(path) as file:
        header = {}
        for name in file.keys():
            part = file.get_slice(name)
            kind = part.get_dtype()
            if kind not in _TYPES:
                raise CheckpointError(f"{path}: tensor {name!r} has type {kind}, which FastUSP does not read")
            header[name] = TensorInfo(tuple(part.get_shape()), _TYPES[kind])
        return header


def read_tensors(
    path: str, names: list[str], device: torch.device, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """The named tensors on `device`, converted to `dtype` unless it is None.

    On the CPU, tensors of the wished type are views of the mapped file: ranks share its pages.
    """
    with _open(path) as file:
        tensors = {}
        for name in names:
            try:
                tensor = file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"tensor {name!r} of {path} cannot be read ({error}); get the file again"
                ) from error
            tensors[name] = tensor.to(device=device, dtype=dtype if dtype is not None else tensor.dtype)
        return tensors


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the tensors in a file's header say of a model of `family`; errors name both."""

    header: dict[str, TensorInfo]
    path: str
    family: str

    def has(self, name: str) -> bool:
        return name in self.header

    def matrix(self, name: str) -> tuple[int, int]:
        """(outputs, inputs) of a weight. Raises CheckpointError where it is missing or no matrix."""
        if name not in self.header:
            raise CheckpointError(f"{self.path} is an incomplete {self.family} file: tensor {name!r} is missing")
        shape = self.header[name].shape
        if len(shape) != 2:
            raise CheckpointError(
                f"{self.path} is no {self.family} file: tensor {name!r} is {shape}, expected a matrix"
            )
        return shape

    def heads(self, hidden: int, dim: int) -> int:
        """Attention heads of `dim` in a width. Raises CheckpointError where that leaves a rest."""
        if hidden % dim:
            raise CheckpointError(
                f"{self.path}: hidden size {hidden} is not a multiple of {self.family}'s head dim, {dim}"
            )
        return hidden // dim

    def count(self, blocks: str) -> int:
        """Blocks named `blocks`.0, `blocks`.1, ..."""
        return len({key.split(".")[1] for key in self.header if key.startswith(blocks + ".")})


def _open(path: str):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no model file {path}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}): it is truncated, corrupt or of another format. "
            "Download it again, or convert it to safetensors"
        ) from error
