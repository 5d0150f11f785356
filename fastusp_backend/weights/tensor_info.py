"""What the header of a model file says of one tensor."""

import math
from dataclasses import dataclass

import torch

from .packings import PACKINGS

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file.

    shape: the shape of its values.
    dtype: their type, float32 where they are packed; None where FastUSP does not know it.
    start: where its bytes begin in the file.
    packing: the format of its blocks (see packings.py), "" for none.
    scale: what its values are to be multiplied by, None for one.
    scales: the tensor in the file of its blocks' or its rows' scales, None for none.
    parts: the tensors in the file whose rows it has, where these are several; `start` is of no meaning then.
    unknown: the name in the file of a type that FastUSP does not know; such a tensor has no size.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    start: int = 0
    packing: str = ""
    scale: float | None = None
    scales: "TensorInfo | None" = None
    parts: "tuple[TensorInfo, ...]" = ()
    unknown: str = ""

    @property
    def pieces(self) -> "tuple[TensorInfo, ...]":
        """What is read of the file for it: its data, or the parts of that, then its scales."""
        return (self.parts or (self,)) + (() if self.scales is None else (self.scales,))

    @property
    def quantised(self) -> bool:
        return bool(self.packing) or self.dtype in FP8

    @property
    def raw_form(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of its data in the file: packed rows are bytes."""
        apart = PACKINGS[self.packing].apart if self.packing else 0
        return self._form(apart)

    @property
    def form(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of its data in memory where it is not converted: the scales of blocks lie in them."""
        return self._form(0)

    @property
    def scale_shape(self) -> tuple[int, ...] | None:
        """The shape of the scale beside that, None for none."""
        if self.scales is not None and self.form == self.raw_form:
            return self.shape[0], 1
        return None if self.scale is None else ()

    def _form(self, apart: int) -> tuple[tuple[int, ...], torch.dtype]:
        if not self.packing:
            return self.shape, self.dtype
        values, size, *_ = PACKINGS[self.packing]
        return (*self.shape[:-1], self.shape[-1] // values * (size - apart)), torch.uint8

    @property
    def size(self) -> int:
        """Bytes of its data in the file, without those of `scales`."""
        shape, dtype = self.raw_form
        return math.prod(shape) * dtype.itemsize
