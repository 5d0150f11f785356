"""What all packed formats have in common: rows of blocks, each of some values in some bytes."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Packing(NamedTuple):
    """A format of packed weights.

    values: of a block.
    size: its bytes in memory.
    unpack: blocks (N, size) uint8 -> (N, values) float32. Where there is a scale beside them, (rows, N, size) and the
        scale, () or (rows, 1, 1) float32 -> (rows, N, values).
    apart: how many of a block's first bytes, its scale, lie in another tensor in the file.
    """

    values: int
    size: int
    unpack: Callable[..., torch.Tensor]
    apart: int = 0
