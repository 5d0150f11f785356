"""Files in the formats that models come in, and what their weights mean by another way than the product's."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from packed_layers import LAYERS
from safetensors.torch import load_file, save_file
from support import SMALL

MINI = replace(SMALL, hidden=256, heads=2, mlp=512, double_blocks=1, single_blocks=1, context=256, pooled=256)
"""Whose rows are whole blocks of GGUF's formats."""
State = dict[str, torch.Tensor]
LIMITS = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
PREFIX = "model.diffusion_model."


def is_matrix(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2


def in_block(name: str, tensor: torch.Tensor) -> bool:
    """Whether it is a matrix of a block, which files have in their format; Z-Image's blocks are `layers`."""
    return is_matrix(tensor) and ("blocks" in name or name.startswith("layers."))


def plain_fp8(state: State, path: Path, dtype: torch.dtype) -> State:
    """Everything cast, as tools do that know no scales."""
    save_file({name: tensor.to(dtype) for name, tensor in state.items()}, path)
    return {name: tensor.to(dtype).float() for name, tensor in state.items()}


def _scaled(state: State, dtype: torch.dtype) -> tuple[State, State, State]:
    """(fp8 tensors, their scales by layer, the values): the middle of a file is quantised, its ends are not."""
    tensors, scales, values = {}, {}, {}
    for name, tensor in state.items():
        tensors[name] = values[name] = tensor.bfloat16()
        if in_block(name, tensor):
            scale = tensor.abs().max() / LIMITS[dtype]
            tensors[name] = (tensor / scale).to(dtype)
            scales[name.removesuffix(".weight")] = scale
            values[name] = tensors[name].float() * scale
    return tensors, scales, {name: value.float() for name, value in values.items()}


def scaled_fp8_old(state: State, path: Path, dtype: torch.dtype, prefix: str = "") -> State:
    """`scaled_fp8`, `scale_weight`, `scale_input`."""
    tensors, scales, values = _scaled(state, dtype)
    tensors["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    for i, (layer, scale) in enumerate(scales.items()):
        tensors[f"{layer}.scale_weight"] = scale
        tensors[f"{layer}.scale_input"] = torch.tensor([1.0 + i])
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    return values


def _scaled_new(state: State, dtype: torch.dtype) -> tuple[State, dict[str, dict], State]:
    tensors, scales, values = _scaled(state, dtype)
    for layer, scale in scales.items():
        tensors[f"{layer}.weight_scale"] = scale
        tensors[f"{layer}.input_scale"] = torch.tensor(0.5)
    return tensors, {layer: {"format": str(dtype).removeprefix("torch.")} for layer in scales}, values


def scaled_fp8_metadata(state: State, path: Path, dtype: torch.dtype) -> State:
    """`_quantization_metadata` in the header."""
    tensors, layers, values = _scaled_new(state, dtype)
    save_file(tensors, path, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})})
    return values


def scaled_fp8_tensors(state: State, path: Path, dtype: torch.dtype) -> State:
    """A `comfy_quant` tensor per layer."""
    tensors, layers, values = _scaled_new(state, dtype)
    for layer, entry in layers.items():
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)
    save_file(tensors, path)
    return values


def packed_layers(state: State, path: Path, *kinds: str, metadata: bool = False, **more) -> State:
    """The matrices of blocks in these formats in turn, "" for none. more: what is said of each layer beside its format;
    in the metadata, else in `comfy_quant` tensors."""
    tensors, said, values = {}, {}, {}
    matrices = [name for name, tensor in state.items() if in_block(name, tensor)]
    for name, tensor in state.items():
        layer, kind = name.removesuffix(".weight"), ""
        if name in matrices:
            kind = kinds[matrices.index(name) % len(kinds)]
        if kind:
            made, entry, values[name] = LAYERS[kind](*tensor.shape, seed=len(values))
            tensors |= {f"{layer}.{leaf}": part for leaf, part in made.items()}
            said[layer] = entry | more
        else:
            tensors[name] = tensor.bfloat16()
            values[name] = tensors[name].float()
    header = {}
    if metadata:
        header["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": said})
    else:
        for layer, entry in said.items():
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)
    save_file(tensors, path, header)
    return values


def all_in_one(state: State, path: Path) -> State:
    """A transformer beside a text encoder and a VAE, which are not to be looked at."""
    tensors = {PREFIX + name: tensor for name, tensor in state.items()}
    others = ("text_encoders.t5xxl.scaled_fp8", "vae.encoder.conv_in.weight", "text_encoders.clip_l.ids.qweight")
    save_file(tensors | {name: torch.zeros(2, dtype=torch.int32) for name in others}, path)
    return {name: tensor.float() for name, tensor in state.items()}


def random_blocks(packing: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """(rows, bytes) uint8 of a GGUF format, whose values spread about as weights do."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[packing]]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (rows * columns // values, size), dtype=np.uint8)
    scales, minima, width = HALVES[packing]
    scale = columns**-0.5 / width * random.uniform(0.8, 1.2, (len(blocks), 1))
    for start, factor in ((scales, 1.0), (minima, -CENTRES.get(packing, 0.0))):
        if start is not None:
            half = (scale * factor).astype(np.float16)
            blocks[:, start : start + 2] = half.view(np.uint8)
    return blocks.reshape(rows, -1)


HALVES = {
    "Q8_0": (0, None, 74),
    "Q4_0": (0, None, 4.6),
    "Q4_1": (0, 2, 4.6),
    "Q5_0": (0, None, 9.2),
    "Q5_1": (0, 2, 9.2),
    "Q2_K": (80, 82, 12),
    "Q3_K": (108, None, 46),
    "Q4_K": (0, 2, 240),
    "Q5_K": (0, 2, 500),
    "Q6_K": (208, None, 1400),
}
"""Bytes at which a block's scale and minimum begin, and the spread of its values at a scale of 1."""
CENTRES = {"Q4_1": 7.5, "Q5_1": 15.5, "Q2_K": -1.5, "Q4_K": -7.5, "Q5_K": -15.5}
"""What times the scale a minimum must be for a mean of zero; of the K formats it is subtracted."""


def as_gguf(state: State, path: Path, packing: str) -> State:
    """The matrices of blocks in `packing`, other matrices in BF16 or F16, vectors in F32, and a leading dimension of 1
    left out, as converters write them."""
    kind = gguf.GGMLQuantizationType[packing]
    writer = gguf.GGUFWriter(path, "flux")
    values = {}
    for i, (name, tensor) in enumerate(state.items()):
        if in_block(name, tensor):
            data = random_blocks(packing, *tensor.shape, seed=i)
            writer.add_tensor(name, data, raw_dtype=kind)
            values[name] = torch.from_numpy(gguf.quants.dequantize(data, kind).copy())
            continue
        held = tensor.to((torch.bfloat16, torch.float16)[i % 2] if is_matrix(tensor) else torch.float32)
        values[name] = held.float()
        held = held[0] if held.shape[:1] == (1,) else held
        if held.dtype == torch.bfloat16:
            writer.add_tensor(name, held.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, held.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS: dict[str, Callable[[State, Path], State]] = {
    "fp8_e4m3fn": lambda state, path: plain_fp8(state, path, E4M3),
    "fp8_e5m2": lambda state, path: plain_fp8(state, path, E5M2),
    "scaled_old": lambda state, path: scaled_fp8_old(state, path, E4M3),
    "scaled_old_prefixed": lambda state, path: scaled_fp8_old(state, path, E4M3, PREFIX),
    "scaled_metadata": lambda state, path: scaled_fp8_metadata(state, path, E4M3),
    "scaled_metadata_e5m2": lambda state, path: scaled_fp8_metadata(state, path, E5M2),
    "scaled_tensors": lambda state, path: scaled_fp8_tensors(state, path, E4M3),
    "all_in_one": all_in_one,
    "nvfp4": lambda state, path: packed_layers(state, path, "nvfp4"),
    "mxfp8": lambda state, path: packed_layers(state, path, "mxfp8", metadata=True),
    "int8_rows": lambda state, path: packed_layers(state, path, "int8_rows"),
    "int8_convrot": lambda state, path: packed_layers(state, path, "int8_convrot", metadata=True),
    "int4_convrot": lambda state, path: packed_layers(state, path, "int4_convrot"),
    "mixed": lambda state, path: packed_layers(state, path, "", *LAYERS),
    "mixed_exact": lambda state, path: packed_layers(state, path, "", *LAYERS, full_precision_matrix_mult=True),
    "gguf_Q8_0": lambda state, path: as_gguf(state, path, "Q8_0"),
    "gguf_Q4_K": lambda state, path: as_gguf(state, path, "Q4_K"),
}
"""writer(state, path) -> the values that the file means, in float32."""


def write(name: str, source: Path, path: Path) -> State:
    """The model of a plain file `source` in a format; returns what it means now."""
    return FORMATS[name](load_file(source), path)


def add_raw(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """Adds tensors of any (type, shape, bytes) to a safetensors file, known to its library or not."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    for name, (kind, shape, values) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + len(values)]}
        body += values
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def retype_gguf(path: Path, name: str, number: int) -> None:
    """Makes a GGUF file say that a tensor is of ggml's type `number`."""
    data, key = bytearray(path.read_bytes()), name.encode()
    after = data.index(len(key).to_bytes(8, "little") + key) + 8 + len(key)
    place = after + 4 + 8 * int.from_bytes(data[after : after + 4], "little")
    data[place : place + 4] = number.to_bytes(4, "little")
    path.write_bytes(data)
