"""In which form each tensor of a file lies in memory: decided once, from its header, before anything is allocated.

All that follows asks the plan: what a rank's weights take, which of them are read straight into their place, what
converting the others needs, whether patches find values that were rounded, what lies on other ranks. Every form takes
the same two steps, of which most tensors need none: their values are cast to the wished type, and quantised to e4m3
with a scale per row for products in fp8.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..config import ModelSpec
from .stored import Stored
from .tensor_info import FP8, TensorInfo

Use = Literal["linear", "fp8_product", "other"]
"""How a model uses a tensor: as the weight of a linear layer, as one whose products may be computed in fp8, or else.
Others are small and read by kernels that know no fp8."""

PIECE = 16 << 20
"""Values that are converted at a time: in float32 those of a whole tensor may be more than a GPU has left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoragePlan:
    """The form of one tensor in memory, and the way there.

    info: the tensor in its file.
    linear: whether it is the weight of a linear layer.
    cast: the type that its values are converted to first; None where they stay as the file has them.
    by_rows: whether they are then brought to e4m3 with a scale per row, where they are not in e4m3 already.
    dtype, shape: the type and the shape of the data in memory, as in `Stored`.
    packing: the format of the data's blocks, "" for none.
    scale: the shape of the scale in memory, None for none.
    small: of values that are unpacked as they are read: the form, as in the file, that they would have. In memory are
        the values that a layer would make of it at each use, so that patches change it, and not what is there.
    """

    info: TensorInfo
    linear: bool
    cast: torch.dtype | None
    by_rows: bool
    dtype: torch.dtype
    shape: tuple[int, ...]
    packing: str
    scale: tuple[int, ...] | None
    small: "StoragePlan | None" = None

    @property
    def unchanged(self) -> bool:
        """Whether the file's bytes are the data in memory, so that they can be read into their place."""
        return self._kept and self.info.form == self.info.raw_form and not self.info.parts

    @property
    def _kept(self) -> bool:
        """Whether the data in memory has the file's form, into which at most scales come from beside it."""
        return self.cast is None and self.dtype == self.info.form[1]

    @property
    def rounded_to_fp8(self) -> bool:
        """Whether the values in memory are fp8 that the file's were converted to."""
        return self.dtype in FP8 and not self._kept

    @property
    def nbytes(self) -> int:
        """Bytes of data and scale in memory."""
        scale = 0 if self.scale is None else math.prod(self.scale) * torch.float32.itemsize
        return self.data_bytes + scale

    @property
    def data_bytes(self) -> int:
        """Bytes of the data in memory, without a scale's."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def reading_bytes(self) -> int:
        """About what reading takes beside `nbytes`: the file's bytes, with the next tensor's, and where they are
        converted a piece's values in float32, of which quantising by rows makes three."""
        files = 2 * (self.info.size + (self.info.scales.size if self.info.scales is not None else 0))
        if self.info.parts:  # one behind the other
            files += self.info.size
        if self._kept:
            return files
        if self.info.form != self.info.raw_form:  # all of it, before a piece is converted
            files += math.prod(self.info.form[0])
        piece = min(self._rows_of_piece * self._row, math.prod(self.info.shape))
        return files + (12 if self.by_rows else 4) * piece

    @property
    def unpacked_bytes(self) -> int:
        """Bytes of the values in 16 bits that a layer makes at each use of this weight, 0 where it computes with what
        is stored."""
        small = self.linear and not self.by_rows and (self.packing or self.dtype in FP8)
        return 2 * math.prod(self.info.shape) if small else 0

    def load(self, raw: torch.Tensor, scales: torch.Tensor | None = None) -> Stored:
        """The tensor in this form, from its bytes in the file, (n,) uint8, and those of its scales where these lie
        apart; over the first ones' memory where it is unchanged."""
        stored = Stored.in_file(raw, self.info, scales)
        if self._kept:
            return stored.by_rows() if self.by_rows else stored
        if len(self.info.shape) < 2 or self._rows_of_piece * self._row >= math.prod(self.info.shape):
            return self._convert(stored, ...)  # all, of a tensor without dimensions as well
        data = torch.empty(self.shape, dtype=self.dtype, device=raw.device)
        scale = None if self.scale is None else torch.empty(self.scale, dtype=torch.float32, device=raw.device)
        stored, out = replace(stored, data=stored.data.flatten(0, -2)), data.flatten(0, -2)
        for first in range(0, len(out), self._rows_of_piece):
            rows = slice(first, first + self._rows_of_piece)
            piece = self._convert(stored, rows)
            out[rows] = piece.data
            if scale is not None:
                scale[rows] = piece.scale
        return Stored(data, scale)

    def _convert(self, stored: Stored, rows) -> Stored:
        """Some rows in this form, by an index."""
        if self.cast is None:
            values = stored.values(torch.float32, rows)
        else:
            scaled = self.info.scale is not None and not self.info.quantised
            through = torch.float32 if scaled or self.cast in FP8 else self.cast  # rounded once
            values = stored.values(through, rows).to(self.cast)
        return Stored(values).by_rows() if self.by_rows else Stored(values.to(self.dtype))

    @property
    def _row(self) -> int:
        """Values of a row, along the last dimension, as packed forms are cut; of a vector, which cannot be, all."""
        return self.info.shape[-1] if self.info.shape else 1

    @property
    def _rows_of_piece(self) -> int:
        """How many rows are converted at a time."""
        return max(1, PIECE // max(1, self._row))

    def unpacked_to(self, compute: torch.dtype) -> "StoragePlan":
        """The form in which layers compute with what is stored small now."""
        return StoragePlan(
            info=self.info,
            linear=True,
            cast=compute,
            by_rows=False,
            dtype=compute,
            shape=self.info.shape,
            packing="",
            scale=None,
            small=self,
        )

    def elsewhere(self) -> Stored:
        """The tensor in this form, without memory: on the meta device."""
        data = torch.empty(self.shape, dtype=self.dtype, device="meta")
        scale = None if self.scale is None else torch.empty(self.scale, dtype=torch.float32, device="meta")
        return Stored(data, scale, self.packing)


def plan_storage(info: TensorInfo, spec: ModelSpec, use: Use) -> StoragePlan:
    """The form in memory of a tensor that a model of `spec` uses in this way.

    A scale of values that are not quantised is multiplied into them. fp8 and packed values stay what they are in linear
    layers' weights where `spec` lets them; elsewhere they are unpacked, and values of fp8 converted to bfloat16,
    which has them all.
    """
    linear, by_rows = use != "other", use == "fp8_product"
    wished = getattr(torch, spec.storage) if spec.storage else info.dtype
    if info.scale is not None and not info.quantised:
        stays = False
    elif info.quantised:
        stays = linear and (spec.storage is None or spec.keep_quantised)
    else:
        stays = wished == info.dtype
    if by_rows:
        dtype, shape, packing, scale = torch.float8_e4m3fn, info.shape, "", (info.shape[0], 1)
    elif stays:
        shape, dtype = info.form
        packing, scale = info.packing, info.scale_shape
    else:
        dtype = wished if linear or wished not in FP8 else torch.bfloat16
        shape, packing, scale = info.shape, "", None
    return StoragePlan(
        info=info,
        linear=linear,
        cast=None if stays else wished,
        by_rows=by_rows,
        dtype=dtype,
        shape=shape,
        packing=packing,
        scale=scale,
    )
