"""A transformer's sizes (widths, heads, blocks), by the shapes of its tensors in a file's header."""

from dataclasses import dataclass

from ..errors import CheckpointError
from .limits import MOST_BLOCKS, WIDEST_MATRIX
from .tensor_info import TensorInfo

_SMALLEST = 128
"""A multiple of the head dim of all families."""


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
        """Returns (outputs, inputs) of a weight that the file has. Raises CheckpointError where it is no matrix, or an
        empty one."""
        shape = self.header[name].shape
        if len(shape) != 2 or not 0 < min(shape) <= max(shape) <= WIDEST_MATRIX:
            raise CheckpointError(
                f"{self.path} is not a {self.family} file: tensor {name!r} is {shape}, expected a matrix of up to "
                f"{WIDEST_MATRIX} rows and columns"
            )
        return shape

    def table(self, name: str) -> int:
        """Returns the rows of a table (1, rows, width) that the file has, whose writer may have left out the leading 1.
        Raises CheckpointError where it is none."""
        shape = self.header[name].shape
        if len(shape) < 2 or shape[:-2] not in ((), (1,)) or not 0 < shape[-2] <= WIDEST_MATRIX:
            raise CheckpointError(
                f"{self.path} is not a {self.family} file: tensor {name!r} is {shape}, expected (1, rows, width)"
            )
        return shape[-2]

    def heads(self, hidden: int, dim: int) -> int:
        """Returns how many attention heads of `dim` a width has. Raises CheckpointError where that leaves a rest."""
        if hidden % dim or not hidden:
            raise CheckpointError(
                f"{self.path}: hidden size {hidden} is not a multiple of {self.family}'s head dim, {dim}"
            )
        return hidden // dim

    def count(self, blocks: str) -> int:
        """Counts the blocks named `blocks`.0, `blocks`.1, ..."""
        count = len({key.split(".")[1] for key in self.header if key.startswith(blocks + ".")})
        if count > MOST_BLOCKS:
            raise CheckpointError(
                f"Use another file than {self.path}: it has {count} {blocks}, no model has more than {MOST_BLOCKS}"
            )
        return count


class AnySizes(Sizes):
    """Sizes of a model whose layers are all as small as can be, but that has the parts and blocks of the file's: which
    tensors a model needs does not depend on their shapes."""

    def matrix(self, name: str) -> tuple[int, int]:
        return _SMALLEST, _SMALLEST

    def table(self, name: str) -> int:
        return 1

    def count(self, blocks: str) -> int:
        return max(super().count(blocks), 1)  # no model is without: the first one's tensors are missing then


class OneOfEach(AnySizes):
    """The same with one block of each kind: what is in a block does not depend on their number."""

    def count(self, blocks: str) -> int:
        return 1
