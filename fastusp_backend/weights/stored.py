"""A weight in memory: in a float type, in fp8 with or without a scale, or packed, and what it means.

Weights are converted where they are used, a layer's or some rows' at a time: a wide copy of them would take two to four
times their memory. Which form a weight has, storage_plan.py decides.
"""

from dataclasses import dataclass

import torch

from ..kernels.eight_bits import quantise
from ..kernels.widen import widen
from .packings import PACKINGS, bytes_of, unpack
from .scaled_blocks import with_scales
from .tensor_info import FP8, TensorInfo


@dataclass(slots=True, eq=False)
class Stored:
    """A tensor in memory.

    data: (..., n) values, or (..., bytes) uint8 where packed.
    scale: () float32, what fp8 or packed values are multiplied by, or (rows, 1), one for each row of a matrix.
    packing: the format of the blocks (see packings.py), "" for none.
    low_rank: up (rows, R) and down (R, n) beside a packed matrix, whose product is added to its values at each use.
    """

    data: torch.Tensor
    scale: torch.Tensor | None = None
    packing: str = ""
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def in_file(cls, raw: torch.Tensor, info: TensorInfo, scales: torch.Tensor | None = None) -> "Stored":
        """A tensor as its file has it, over the memory of its bytes `raw`, (n,) uint8; but scales of blocks, which lie
        apart there, come into them. scales: the bytes of `info.scales`."""
        shape, dtype = info.raw_form
        data = raw.view(dtype).view(shape)
        scale = None if info.scale is None else torch.tensor(info.scale, dtype=torch.float32, device=raw.device)
        if info.form != info.raw_form:
            data = with_scales(data, scales, PACKINGS[info.packing])
        elif info.scales is not None:
            scale = scales.view(info.scales.dtype).to(torch.float32).view(info.scale_shape)
        return cls(data, scale, info.packing)

    def values(self, dtype: torch.dtype, rows: slice = slice(None), columns: slice | None = None) -> torch.Tensor:
        """Returns the values of some rows (and of a matrix some columns) in `dtype`. fp8 is converted, then multiplied
        by its scale, both in `dtype`, as ComfyUI does; packed values are rounded once from float32."""
        data = self.data[rows]
        scale = self.scale[rows] if self.scale is not None and self.scale.dim() else self.scale
        if self.packing:
            low_rank = self.low_rank and (self.low_rank[0][rows], self.low_rank[1])
            within = None if columns is None else bytes_of(columns, self.packing, data.shape[1])
            if within is None:
                values = unpack(data, self.packing, dtype, low_rank, scale)
                return values if columns is None else values[:, columns]
            low_rank = low_rank and (low_rank[0], low_rank[1][:, columns])
            return unpack(data[:, within], self.packing, dtype, low_rank, scale)
        data = data if columns is None else data[:, columns]
        if data.dtype in FP8:
            return widen(data, scale, dtype)
        return data.to(dtype) if scale is None else data.to(dtype, copy=True).mul_(scale.to(dtype))

    def by_rows(self) -> "Stored":
        """Returns this matrix in e4m3 with a scale for each row, for products in fp8; e4m3 values stay as they are."""
        if self.data.dtype == torch.float8_e4m3fn:
            scale = self.data.new_ones((), dtype=torch.float32) if self.scale is None else self.scale
            return Stored(self.data, scale.expand(len(self.data), 1).contiguous())
        values, scales = quantise(self.values(torch.float32))
        return Stored(values, scales[:, None].contiguous())

    def dequantise(self) -> torch.Tensor:
        """Returns the values in float32, a tensor of their own."""
        values = self.values(torch.float32)
        return values.clone() if values.data_ptr() == self.data.data_ptr() else values

    def store(self, values: torch.Tensor) -> None:
        """Writes values (float32, as `dequantise` gives them) in the stored type, in place: addresses stay. Scaled fp8
        gets the scale that takes the largest value to the end of the type's range, as ComfyUI's does. Not for packed
        weights.
        """
        if self.data.dtype in FP8:
            limit = torch.finfo(self.data.dtype).max
            if self.scale is not None:
                largest = values.abs().amax(-1, keepdim=True) if self.scale.dim() else values.abs().amax()
                self.scale.copy_((largest / limit).clamp(min=torch.finfo(torch.float32).tiny))
                values = values / self.scale
            values = values.clamp(-limit, limit)  # torch's own conversion gives NaN beyond the range of e4m3fn
        self.data.copy_(values)

    def restore(self, other: "Stored") -> None:
        """Takes over values and scale of the same tensor, read anew, in place: addresses stay."""
        self.data.copy_(other.data)
        if self.scale is not None:
            self.scale.copy_(other.scale)
