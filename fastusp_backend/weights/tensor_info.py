"""What the header of a model file says of one tensor."""

import math
from dataclasses import dataclass

import torch

from .packing import PACKINGS

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file.

    shape: of its values. dtype: theirs; of packed ones, float32; None where FastUSP does not know the type, whose name
    in the file is `unknown` then. start: where its bytes begin in the file. packing: its GGUF block format, "" for
    none. scale: what its fp8 values are to be multiplied by. A tensor of an unknown type has no size.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    start: int = 0
    packing: str = ""
    scale: float | None = None
    unknown: str = ""

    @property
    def quantised(self) -> bool:
        return bool(self.packing) or self.dtype in FP8

    @property
    def stored(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of what lies in the file: packed rows are bytes."""
        if not self.packing:
            return self.shape, self.dtype
        values, size, _ = PACKINGS[self.packing]
        return (*self.shape[:-1], self.shape[-1] // values * size), torch.uint8

    @property
    def size(self) -> int:
        """In bytes."""
        shape, dtype = self.stored
        return math.prod(shape) * dtype.itemsize
