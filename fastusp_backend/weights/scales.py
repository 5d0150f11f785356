"""Which scale belongs to which fp8 or packed weight, and the refusal of every other quantisation by its name.

Three ways to say it, as ComfyUI reads them; the last two also of layers in nvfp4, mxfp8 and int8 (packed_layers.py),
among others that may have another format, or none:
- old: a tensor `scaled_fp8` marks the file, `layer.scale_weight` and `layer.scale_input` hold the scales;
- new: the metadata's `_quantization_metadata`, {"layers": {layer: {"format": ...}}}, with `layer.weight_scale` and
  `layer.input_scale`;
- the same with a tensor `layer.comfy_quant` of JSON bytes, {"format": ...}, for each layer.

The inputs' scales are not used: what a weight's values are does not depend on them, and products in fp8 measure a scale
for each token. What a file says of layers that the
transformer does not have is not looked at.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import msgspec
import torch

from ..errors import CheckpointError
from .contents import Contents
from .limits import LONGEST_MARK
from .packed_layers import FORMATS, read_layer
from .refusals import READS, contradicts, lacks, refusal, type_of
from .tensor_info import FP8, TensorInfo

_FORMATS = {str(dtype).removeprefix("torch."): dtype for dtype in FP8}
_INPUT_SCALES = ("scale_input", "input_scale")

# Parts of tensor names that only one foreign quantisation has, checked in this order.
_FOREIGN = (
    ("bitsandbytes__nf4", "bitsandbytes NF4"),
    ("bitsandbytes__fp4", "bitsandbytes FP4"),
    (".quant_map", "bitsandbytes"),
    (".SCB", "bitsandbytes int8"),
    (".wscales", "SVDQuant (Nunchaku)"),
    (".qzeros", "GPTQ or AWQ"),
    (".qweight", "GPTQ or AWQ"),
)


def refuse_foreign(contents: Contents, layers: Iterable[str] | None = None) -> None:
    """Raises CheckpointError naming the quantisation of another tool. layers: those alone whose tensors count; without,
    all."""
    layers = None if layers is None else set(layers)
    deepest = max((layer.count(".") + 1 for layer in layers or ()), default=0)
    for mark, name in _FOREIGN:
        for key in contents.tensors:
            if mark in key and (layers is None or _any_begins(key, layers, deepest)):
                raise refusal(contents.path, name, key)


def fold_scales(contents: Contents, needed: Iterable[str]) -> dict[str, TensorInfo]:
    """The tensors that a transformer needs, all of which the file has, each with its scale.

    Raises CheckpointError naming the first whose quantisation FastUSP does not read, or which misses a scale or a mark
    that says how to read it.
    """
    tensors, folded = contents.tensors, {}
    for name in needed:
        info, scale = tensors[name], None
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight":
            info, scale = _weight(contents, layer)
        if not _readable(info):
            raise _unread(contents, name)
        if scale is not None:
            info = replace(info, scale=_value(contents, scale, info.packing or "fp8"))
        folded[name] = info
    _refuse_unmarked(contents, folded)
    return folded


def used_for_scales(name: str, needed: dict[str, TensorInfo]) -> bool:
    """Whether a tensor says how to read a needed one, or would scale its inputs."""
    layer, _, leaf = name.rpartition(".")
    telling = ("scale_weight", "weight_scale", "weight_scale_2", "comfy_quant", *_INPUT_SCALES)
    return name == "scaled_fp8" or leaf in telling and f"{layer}.weight" in needed


def _weight(contents: Contents, layer: str) -> tuple[TensorInfo, str | None]:
    """A layer's weight, and the name of the tensor that holds its scale; None where it has none."""
    path, tensors = contents.path, contents.tensors
    entry, weight = _declared(contents, layer), tensors[f"{layer}.weight"]
    if entry is None:
        scale = f"{layer}.scale_weight"
        if contents.scaled and scale in tensors:
            return weight, scale
        unmarked = any(f"{layer}.{leaf}" in tensors for leaf in ("scale_weight", "weight_scale"))
        told = contents.scaled or any(f"{layer}.{leaf}" in tensors for leaf in _INPUT_SCALES)
        if weight.dtype in FP8 and len(weight.shape) > 1 and told and not unmarked:
            raise lacks(path, "scaled fp8", scale if contents.scaled else f"{layer}.weight_scale")
        return weight, None
    form, scale = entry.get("format"), f"{layer}.weight_scale"
    if isinstance(form, str) and form in FORMATS:
        return read_layer(contents, layer, form, entry)
    if not isinstance(form, str) or form not in _FORMATS:
        raise refusal(path, str(form), layer)
    if weight.dtype != _FORMATS[form]:
        raise contradicts(path, layer, form, weight)
    if scale not in tensors:
        raise lacks(path, "scaled fp8", scale)
    return weight, scale


def _declared(contents: Contents, layer: str) -> dict[str, Any] | None:
    """What the file says of a layer's format: in its metadata, else in a `comfy_quant` tensor."""
    name = f"{layer}.comfy_quant"
    info = contents.tensors.get(name)
    try:
        if layer in contents.formats:
            return msgspec.convert(contents.formats[layer], dict[str, Any])
        if info is None:
            return None
        if info.dtype != torch.uint8 or info.size > LONGEST_MARK:
            raise ValueError(
                f"{name!r} is {type_of(info)} {info.shape}, expected up to {LONGEST_MARK} bytes of text, uint8"
            )
        return msgspec.json.decode(contents.source.read(info.start, info.size), type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{contents.path}: what it says of the quantisation of {layer!r} is malformed ({error})"
        ) from error


def _value(contents: Contents, name: str, form: str) -> float:
    info = contents.tensors[name]
    if not _readable(info):
        raise refusal(contents.path, f"{form} with scales of type {type_of(info)}", name)
    if info.size != info.dtype.itemsize:
        raise refusal(contents.path, f"{form} with more than one scale per tensor, {info.shape},", name)
    value = torch.frombuffer(bytearray(contents.source.read(info.start, info.size)), dtype=info.dtype).item()
    if value == 0 or not math.isfinite(value):
        raise CheckpointError(f"Download {contents.path} again, or use another file: its scale {name!r} is {value}")
    return value


def _refuse_unmarked(contents: Contents, folded: dict[str, TensorInfo]) -> None:
    """Refuses scales beside a needed weight that nothing says how to use: without them it would mean something else."""
    for key in contents.tensors:
        layer, _, leaf = key.rpartition(".")
        weight = folded.get(f"{layer}.weight")
        if weight is None or key in folded or leaf in _INPUT_SCALES or "scale" not in leaf and "zero" not in leaf:
            continue
        told = weight.scale is not None or weight.scales is not None
        if leaf == "scale_weight" and not contents.scaled and not told:
            missing = "the tensor 'scaled_fp8', which marks such files,"
        elif leaf == "weight_scale" and not told:
            missing = (
                f"the tensor '{layer}.comfy_quant', or _quantization_metadata in its header, which says its format,"
            )
        elif leaf in ("scale_weight", "weight_scale") or leaf == "weight_scale_2" and weight.packing == "nvfp4":
            continue
        else:
            raise refusal(contents.path, f"something with a {leaf!r}", key)
        raise CheckpointError(
            f"Use another file, or add the mark to {contents.path}: {key!r} is the scale of a weight, but {missing} "
            "is missing"
        )


def _readable(info: TensorInfo) -> bool:
    """Whether a tensor's type is one that weights and scales may have."""
    return info.dtype is not None and (info.dtype in FP8 or info.dtype.is_floating_point and info.dtype.itemsize > 1)


def _unread(contents: Contents, name: str) -> CheckpointError:
    info, layer = contents.tensors[name], name.rpartition(".")[0]
    if info.dtype not in (torch.int8, torch.uint8):
        return refusal(contents.path, type_of(info), name)
    return CheckpointError(
        f"Use another file: {contents.path} is quantised as {type_of(info)} ({name!r}), and neither a tensor "
        f"'{layer}.comfy_quant' nor _quantization_metadata in its header says what these bytes mean. FastUSP reads "
        f"{READS}"
    )


def _any_begins(key: str, layers: set[str], deepest: int) -> bool:
    """Whether a tensor's name begins with that of one of these layers, whose names have up to `deepest` parts."""
    parts = key.split(".")[: deepest + 1]
    return any(".".join(parts[:end]) in layers for end in range(1, len(parts)))
