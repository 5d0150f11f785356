"""What a transformer's tensors in its file say of it: its types and its sizes."""

from collections import Counter
from dataclasses import dataclass
from math import prod

import torch

from ..config import Storage
from ..errors import CheckpointError
from .headers import TensorInfo

__all__ = ["AnySizes", "OneOfEach", "Sizes", "TensorInfo", "choose_types", "main_dtype"]

_MOST_BLOCKS = 200
"""Of a kind; models have up to 60."""
_WIDEST = 1 << 24
"""Rows or columns of a matrix; models have up to some 10,000. What sizes are computed from it stay numbers of 64 bits.
"""
_SMALLEST = 128
"""The head dim of all families."""


def main_dtype(header: dict[str, TensorInfo]) -> torch.dtype:
    """The type of most of the values; packed ones count as float32."""
    counts = Counter()
    for info in header.values():
        counts[info.dtype] += prod(info.shape)
    return counts.most_common(1)[0][0]


def choose_types(storage: Storage | None, file_dtype: torch.dtype, *, cpu: bool, bfloat16: bool, float16: bool) -> dict:
    """ModelSpec's types for a wished storage type (None: the default) and a file of mostly `file_dtype`.

    CPU ranks compute in float32, as ComfyUI does on a CPU. GPUs compute in the storage type, which by default is the
    file's; float32 files are stored, as ComfyUI stores them, in 16 bits unless float32 is asked for. Where a model does
    not compute in float16 or a GPU in bfloat16 (the flags), the other type computes. Weights that are in fp8 or packed,
    and by default stay so, are converted as they are used.
    """
    if cpu:
        return {"storage": storage, "compute": "float32"}
    keep = storage is None
    if storage is None:
        storage = "float16" if file_dtype == torch.float16 or not bfloat16 else "bfloat16"
    compute = "bfloat16" if storage.startswith("float8") else storage
    if compute == "bfloat16" and not bfloat16:
        compute = "float16" if float16 else "float32"
    elif compute == "float16" and not float16:
        compute = "bfloat16" if bfloat16 else "float32"
    return {"storage": storage, "compute": compute, "keep_quantised": keep}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the tensors in a file's header say of a model of `family`; errors name both."""

    header: dict[str, TensorInfo]
    path: str
    family: str

    def has(self, part: str) -> bool:
        """Whether the file has a tensor of this name, or some of this part of the model."""
        return part in self.header or any(name.startswith(part + ".") for name in self.header)

    def matrix(self, name: str) -> tuple[int, int]:
        """(outputs, inputs) of a weight that the file has. Raises CheckpointError where it is no matrix, or an empty
        one."""
        shape = self.header[name].shape
        if len(shape) != 2 or not 0 < min(shape) <= max(shape) <= _WIDEST:
            raise CheckpointError(
                f"{self.path} is no {self.family} file: tensor {name!r} is {shape}, expected a matrix of up to "
                f"{_WIDEST} rows and columns"
            )
        return shape

    def heads(self, hidden: int, dim: int) -> int:
        """Attention heads of `dim` in a width. Raises CheckpointError where that leaves a rest."""
        if hidden % dim or not hidden:
            raise CheckpointError(
                f"{self.path}: hidden size {hidden} is not a multiple of {self.family}'s head dim, {dim}"
            )
        return hidden // dim

    def count(self, blocks: str) -> int:
        """Blocks named `blocks`.0, `blocks`.1, ..."""
        count = len({key.split(".")[1] for key in self.header if key.startswith(blocks + ".")})
        if count > _MOST_BLOCKS:
            raise CheckpointError(
                f"Take another file than {self.path}: it has {count} {blocks}, no model has more than {_MOST_BLOCKS}"
            )
        return count


class AnySizes(Sizes):
    """Of a model whose layers are all as small as can be, but that has the parts and blocks of the file's: which
    tensors a model needs does not depend on their shapes."""

    def matrix(self, name: str) -> tuple[int, int]:
        return _SMALLEST, _SMALLEST

    def count(self, blocks: str) -> int:
        return max(super().count(blocks), 1)  # no model is without: the first one's tensors are missing then


class OneOfEach(AnySizes):
    """Of the same with one block of each kind: what is in a block does not depend on their number."""

    def count(self, blocks: str) -> int:
        return 1
