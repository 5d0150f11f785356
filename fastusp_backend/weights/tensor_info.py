"""What the header of a model file says of one tensor."""

import math
from dataclasses import dataclass

import torch

from .gguf_blocks import PACKINGS

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file.

    shape: the shape of its values.
    dtype: their type, float32 where they are packed; None where FastUSP does not know it.
    start: where its bytes begin in the file.
    packing: its GGUF block format, "" for none.
    scale: what its values are to be multiplied by, None for one.
    unknown: the name in the file of a type that FastUSP does not know; such a tensor has no size.
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
    def raw_form(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of its data in the file: packed rows are bytes."""
        if not self.packing:
            return self.shape, self.dtype
        values, size, _ = PACKINGS[self.packing]
        return (*self.shape[:-1], self.shape[-1] // values * size), torch.uint8

    @property
    def size(self) -> int:
        """Bytes of its data in the file."""
        shape, dtype = self.raw_form
        return math.prod(shape) * dtype.itemsize
