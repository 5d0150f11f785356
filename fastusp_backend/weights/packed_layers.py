"""What a file must have of a layer that it says to be nvfp4, mxfp8, int8 or int4, each layer in a format of its own.

| format | `weight` | `weight_scale` | `weight_scale_2` |
|---|---|---|---|
| nvfp4 | U8, (rows, columns / 2) | e4m3, in cuBLAS' order, as F8_E4M3 or U8 | one, F32 |
| mxfp8 | F8_E4M3 | e8m0, in cuBLAS' order, as F8_E8M0 or U8 | |
| int8_tensorwise | I8 | one, or one a row, F32 | |
| convrot_w4a4 | I8, (rows, columns / 2) | one, or one a row, F32 | |

Rows of the last one are rotated, in groups of `convrot_groupsize`, which is said of the layer, itself or in `params`;
those of an int8 layer where `convrot` is said too.
"""

import math
from dataclasses import replace
from typing import Any

import torch

from ..errors import CheckpointError
from .contents import Contents
from .packings import PACKINGS
from .refusals import contradicts, lacks, refusal, type_of
from .scaled_blocks import GROUPS, count_of_scales, rotated
from .tensor_info import TensorInfo

_BLOCK_SCALES = {"nvfp4": torch.float8_e4m3fn, "mxfp8": torch.float8_e8m0fnu}
_WEIGHTS = {
    "nvfp4": torch.uint8,
    "mxfp8": torch.float8_e4m3fn,
    "int8_tensorwise": torch.int8,
    "convrot_w4a4": torch.int8,
}
FORMATS = frozenset(_WEIGHTS)
_HALF_BYTES = ("nvfp4", "convrot_w4a4")
_DEFAULT_GROUP = 256


def read_layer(contents: Contents, layer: str, form: str, entry: dict[str, Any]) -> tuple[TensorInfo, str | None]:
    """A layer's weight, and the name of the tensor that has a scale for all of it, None for none.

    form: one of FORMATS. entry: what the file says of the layer.

    Raises CheckpointError where its tensors do not make a weight of this format.
    """
    path, name, scales_name = contents.path, f"{layer}.weight", f"{layer}.weight_scale"
    weight, scales = contents.tensors[name], contents.tensors.get(scales_name)
    if weight.dtype != _WEIGHTS[form] or len(weight.shape) != 2:
        raise contradicts(path, layer, form, weight)
    if scales is None:
        raise lacks(path, form, scales_name)
    packing = form if form in _BLOCK_SCALES else _integers(path, layer, form, entry)
    values = PACKINGS[packing].values
    rows, columns = weight.shape[0], weight.shape[1] * (2 if form in _HALF_BYTES else 1)
    if columns % values:
        raise CheckpointError(
            f"Use another file than {path}: {name!r} has {columns} columns, where its format {packing} has blocks of "
            f"{values}"
        )
    info = TensorInfo((rows, columns), torch.float32, weight.start, packing)
    count, expected = math.prod(scales.shape), rows
    if form in _BLOCK_SCALES:
        expected, known = count_of_scales(rows, columns // values), (_BLOCK_SCALES[form], torch.uint8)
        scales = replace(scales, dtype=torch.uint8) if scales.dtype in known else scales
        readable = scales.dtype == torch.uint8
    else:
        readable = scales.dtype is not None and scales.dtype.is_floating_point and scales.dtype.itemsize > 1
    if not readable:
        raise refusal(path, f"{form} with scales of type {type_of(scales)}", scales_name)
    if form not in _BLOCK_SCALES and count == 1:
        return info, scales_name
    if count != expected:
        raise refusal(path, f"{form} with scales {scales.shape}, where {expected} were expected,", scales_name)
    scale = f"{layer}.weight_scale_2" if form == "nvfp4" else None
    if scale is not None and scale not in contents.tensors:
        raise lacks(path, form, scale)
    return replace(info, scales=scales), scale


def _integers(path: str, layer: str, form: str, entry: dict[str, Any]) -> str:
    """The packing of an int8 or int4 layer."""
    params = entry.get("params")
    said = (params if isinstance(params, dict) else {}) | entry
    if form == "int8_tensorwise" and not said.get("convrot", False):
        return "int8"
    wanted = said.get("convrot_groupsize", _DEFAULT_GROUP)
    try:
        group = int(wanted)  # as ComfyUI reads it
    except (TypeError, ValueError, OverflowError):
        group = None
    if group not in GROUPS:
        raise refusal(path, f"{form} with convrot in groups of {wanted}", layer)
    return rotated(8 if form == "int8_tensorwise" else 4, group)
