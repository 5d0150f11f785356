"""What lies before the data of a safetensors file (huggingface.co/docs/safetensors): a length, then JSON.

Read here and not by the package `safetensors`, which refuses a file for one tensor of a type that it does not know, and
bounds less than limits.py does.
"""

from collections.abc import Callable
from typing import Annotated

import msgspec
import torch

from .limits import check_count, check_dimensions, check_length, check_name
from .tensor_info import TensorInfo

_TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class _Entry(msgspec.Struct):
    """What a safetensors header says of a tensor."""

    dtype: Annotated[str, msgspec.Meta(max_length=32)]
    shape: tuple[_Count, ...]
    data_offsets: tuple[_Count, _Count]


_HEADER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRY = msgspec.json.Decoder(_Entry)
_METADATA = msgspec.json.Decoder(dict[str, str] | None)


def safetensors_header(read: Callable[[int, int], bytes], length: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file of `length` bytes, and its metadata; read(start, count) gives some of them.

    Raises ValueError for a file that is cut short or contradicts itself; TooLarge for one whose header is larger than
    any model's.
    """
    size = int.from_bytes(read(0, min(8, length)), "little")
    if not 2 <= size <= length - 8:
        raise ValueError(f"its header would have {size} bytes, the file has {length}")
    check_length(size)
    header = _HEADER.decode(read(8, size))
    metadata = _decoded(_METADATA, header.pop("__metadata__", b"{}"), "its metadata") or {}
    check_count(len(header))
    tensors, ends = {}, {}
    for name, raw in header.items():
        check_name(name)
        entry = _decoded(_ENTRY, raw, f"tensor {name!r}")
        check_dimensions(name, len(entry.shape))
        (start, stop), dtype = entry.data_offsets, _TYPES.get(entry.dtype)
        info = TensorInfo(entry.shape, dtype, 8 + size + start, unknown="" if dtype is not None else entry.dtype)
        if stop < start or dtype is not None and stop - start != info.size:
            raise ValueError(f"tensor {name!r} has {stop - start} bytes, its shape {info.shape} takes {info.size}")
        tensors[name], ends[name] = info, 8 + size + stop
    _check_order(tensors, ends, 8 + size, length)
    return tensors, metadata


def _decoded(decoder: msgspec.json.Decoder, text: msgspec.Raw | bytes, what: str):
    try:
        return decoder.decode(text)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _check_order(tensors: dict[str, TensorInfo], ends: dict[str, int], begin: int, length: int) -> None:
    """In safetensors files the tensors lie one behind the other, from `begin` to the end. Others are corrupt, or have a
    name twice, of which one is hidden here. ends: the byte behind each."""
    for name in sorted(tensors, key=lambda name: (tensors[name].start, ends[name])):
        if tensors[name].start != begin:
            raise ValueError(f"tensor {name!r} begins at byte {tensors[name].start}, where {begin} was expected")
        begin = ends[name]
    if begin < length:
        raise ValueError(f"its last tensor ends at byte {begin}, the file at byte {length}")
