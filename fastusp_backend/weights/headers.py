"""What a model file holds, by its header alone. Two formats: safetensors (huggingface.co/docs/safetensors) and GGUF
(github.com/ggml-org/ggml, docs/gguf.md), told apart by their first bytes, not by names."""

import math
import re
from dataclasses import dataclass
from typing import Annotated

import msgspec
import torch

from ..errors import CheckpointError
from .gguf_header import gguf_header
from .limits import TooLarge, check_count, check_dimensions, check_length, check_name
from .packing import PACKINGS
from .source import Source

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SAFETENSORS = {
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
_GGUF = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<[!?a-z][-a-z]{2}", re.IGNORECASE)
"""Never a safetensors header's length: that would be of GB."""


class _Entry(msgspec.Struct):
    """What a safetensors header says of a tensor."""

    dtype: Annotated[str, msgspec.Meta(max_length=32)]
    shape: tuple[_Count, ...]
    data_offsets: tuple[_Count, _Count]


_HEADER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRY = msgspec.json.Decoder(_Entry)
_METADATA = msgspec.json.Decoder(dict[str, str] | None)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file.

    shape: of its values. dtype: theirs; of packed ones, float32; None where FastUSP does not know the type, whose name
    in the file is `unknown` then. start: where its bytes begin in the file. packing: its GGUF block format, "" for
    none. scale: what its fp8 values are to be multiplied by. A tensor of an unknown type has no size.
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
    def stored(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of what lies in the file: packed rows are bytes."""
        if not self.packing:
            return self.shape, self.dtype
        values, size, _ = PACKINGS[self.packing]
        return (*self.shape[:-1], self.shape[-1] // values * size), torch.uint8

    @property
    def size(self) -> int:
        """In bytes."""
        shape, dtype = self.stored
        return math.prod(shape) * dtype.itemsize


def read_file_header(source: Source) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """All tensors of a file, of whatever type, and its metadata (safetensors alone), without reading a tensor.

    Raises CheckpointError for a file that is truncated, corrupt, of another format, or whose header is larger than any
    model's; in bounded time and memory, whatever lies in it.
    """
    path, length = source.path, source.state.size
    begin = source.read(0, min(64, length))
    _refuse_other_downloads(path, begin)
    try:
        if begin[:4] == b"GGUF":
            tensors, metadata = _gguf(source), {}
        elif begin[:4] == b"PK\x03\x04" or begin[:2] == b"\x80\x02":
            raise CheckpointError(
                f"{path} is a PyTorch pickle file, which can run code when it is read; FastUSP reads safetensors "
                "and GGUF. Convert it to safetensors"
            )
        else:
            tensors, metadata = _safetensors(source, int.from_bytes(begin[:8], "little"))
    except TooLarge as error:
        raise CheckpointError(f"Take another file: {path} {error}") from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from error
    for name, info in tensors.items():
        if info.dtype is not None and (end := info.start + info.size) > length:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r} ends at byte {end}, the file at byte {length}. Download it again"
            )
    return tensors, metadata


def _safetensors(source: Source, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    length = source.state.size
    if not 2 <= size <= length - 8:
        raise ValueError(f"its header would have {size} bytes, the file has {length}")
    check_length(size)
    header = _HEADER.decode(source.read(8, size))
    metadata = _decoded(_METADATA, header.pop("__metadata__", b"{}"), "its metadata") or {}
    check_count(len(header))
    tensors, ends = {}, {}
    for name, raw in header.items():
        check_name(name)
        entry = _decoded(_ENTRY, raw, f"tensor {name!r}")
        check_dimensions(name, len(entry.shape))
        (start, stop), dtype = entry.data_offsets, _SAFETENSORS.get(entry.dtype)
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


def _gguf(source: Source) -> dict[str, TensorInfo]:
    tensors = {}
    for name, kind, shape, start in gguf_header(source.read, source.state.size):
        packing = kind if kind in PACKINGS else ""
        dtype = torch.float32 if packing else _GGUF.get(kind)
        if packing and (not shape or shape[-1] % PACKINGS[packing][0]):
            raise ValueError(f"tensor {name!r} of shape {shape} is no whole number of {kind}'s blocks")
        tensors[name] = TensorInfo(shape, dtype, start, packing, unknown="" if dtype is not None else f"GGUF {kind}")
    end = 0
    for start, size, name in sorted((x.start, x.size, name) for name, x in tensors.items() if x.dtype is not None):
        if start < end:
            raise ValueError(f"tensor {name!r} begins at byte {start}, within another that ends at {end}")
        end = start + size
    return tensors


def _refuse_other_downloads(path: str, begin: bytes) -> None:
    """Names what often lies in a model's place, by its first bytes."""
    if _WEB_PAGE.match(begin):
        raise CheckpointError(
            f"{path} is a web page, not a model: log in where it was downloaded, and download the file itself"
        )
    if begin.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not a model: run git lfs pull in its folder")


def _unreadable(path: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read as safetensors or GGUF ({why}): it is truncated, corrupt or of another format. "
        "Download it again, or convert it to safetensors"
    )
