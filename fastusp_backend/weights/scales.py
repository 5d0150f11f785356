"""Which scale belongs to which fp8 weight, and the refusal of every other quantisation by its name.

Three ways to say it, all per tensor, as ComfyUI reads them:
- old: a tensor `scaled_fp8` marks the file, `layer.scale_weight` and `layer.scale_input` hold the scales;
- new: the metadata's `_quantization_metadata`, {"layers": {layer: {"format": ...}}}, with `layer.weight_scale` and
  `layer.input_scale`;
- the same with a tensor `layer.comfy_quant` of JSON bytes, {"format": ...}, for each layer.

The inputs' scales are not used: products in fp8 measure a scale for each token.
"""

import json
from dataclasses import replace

import torch

from ..errors import CheckpointError
from .headers import FP8, TensorInfo

PREFIX = "model.diffusion_model."
"""Of the transformer's tensors in an all-in-one checkpoint."""
READS = "bf16, fp16, fp32, fp8 (e4m3fn, e5m2), scaled fp8 and GGUF"
_FORMATS = {str(dtype).removeprefix("torch."): dtype for dtype in FP8}

# Parts of tensor names that only one foreign quantisation has, checked in this order.
_FOREIGN = (
    ("bitsandbytes__nf4", "bitsandbytes NF4"),
    ("bitsandbytes__fp4", "bitsandbytes FP4"),
    (".quant_map", "bitsandbytes"),
    (".wscales", "SVDQuant (Nunchaku)"),
    (".qzeros", "GPTQ or AWQ"),
    (".qweight", "GPTQ or AWQ"),
)


def fold_scales(tensors: dict[str, TensorInfo], metadata: dict[str, str], path: str) -> dict[str, TensorInfo]:
    """The weights of a transformer, each with its scale; the tensors that held scales and formats are gone.

    Raises CheckpointError naming a quantisation that FastUSP does not read.
    """
    for mark, name in _FOREIGN:
        if any(mark in key for key in tensors):
            raise _refusal(path, name, mark)
    weights = dict(tensors)
    with open(path, "rb") as file:
        formats = _declared(file, weights, metadata)
        old = weights.pop("scaled_fp8", None) is not None
        for layer, name in formats.items():
            if name not in _FORMATS:
                raise _refusal(path, str(name), layer)
            _scale(file, weights, layer, "weight_scale", "input_scale", path)
            if weights[f"{layer}.weight"].dtype != _FORMATS[name]:
                kind = weights[f"{layer}.weight"].dtype
                raise CheckpointError(f"{path}: {layer!r} is said to be {name}, but its weight is {kind}")
        if old:
            for key in [key for key in weights if key.endswith(".scale_weight")]:
                _scale(file, weights, key.removesuffix(".scale_weight"), "scale_weight", "scale_input", path)
    return weights


def check_types(header: dict[str, TensorInfo], path: str) -> None:
    """Raises CheckpointError for a transformer's file with tensors of a type that only quantised weights have. Other
    models keep such types beside their weights, so this is to be asked once the file is known to be a transformer's.
    """
    for name, info in header.items():
        if not info.dtype.is_floating_point or info.dtype.itemsize == 1 and info.dtype not in FP8:
            raise _refusal(path, str(info.dtype).removeprefix("torch."), name)


def _declared(file, weights: dict[str, TensorInfo], metadata: dict[str, str]) -> dict[str, str]:
    """Layer -> format, as the file's metadata or its `comfy_quant` tensors say; the latter are taken out."""
    layers = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
    layers = {name.removeprefix(PREFIX): entry for name, entry in layers.items()}
    for key in [key for key in weights if key.endswith(".comfy_quant")]:
        layers[key.removesuffix(".comfy_quant")] = json.loads(_bytes(file, weights.pop(key)))
    return {layer: entry.get("format") for layer, entry in layers.items() if f"{layer}.weight" in weights}


def _scale(file, weights: dict[str, TensorInfo], layer: str, scale: str, input_scale: str, path: str) -> None:
    """Moves a layer's scale into its weight's entry and drops its input's."""
    info, weight = weights.pop(f"{layer}.{scale}", None), weights.get(f"{layer}.weight")
    weights.pop(f"{layer}.{input_scale}", None)
    if weight is None or info is None:
        missing = f"{layer}.weight" if weight is None else f"{layer}.{scale}"
        raise CheckpointError(f"{path} is an incomplete scaled fp8 file: tensor {missing!r} is missing")
    if info.size != info.dtype.itemsize:
        raise _refusal(path, f"fp8 with more than one scale per tensor, {info.shape},", f"{layer}.{scale}")
    value = torch.frombuffer(bytearray(_bytes(file, info)), dtype=info.dtype).item()
    weights[f"{layer}.weight"] = replace(weight, scale=value)


def _bytes(file, info: TensorInfo) -> bytes:
    file.seek(info.start)
    return file.read(info.size)


def _refusal(path: str, kind: str, where: str) -> CheckpointError:
    return CheckpointError(f"{path} is quantised as {kind} ({where!r}), which FastUSP does not read; it reads {READS}")
