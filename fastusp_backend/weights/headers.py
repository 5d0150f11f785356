"""What a model file holds, by its header alone. Two formats: safetensors (huggingface.co/docs/safetensors) and GGUF
(github.com/ggml-org/ggml, docs/gguf.md), told apart by their first bytes, not by names."""

import json
import math
import os
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from .gguf_header import gguf_header
from .packing import PACKINGS

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
_LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""


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


def read_file_header(path: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """All tensors of a file, of whatever type, and its metadata (safetensors alone), without reading a tensor.

    Raises CheckpointError for a file that is missing, truncated, corrupt or of another format.
    """
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if start[:4] == b"GGUF":
                tensors, metadata = _gguf(file, length), {}
            elif start[:4] == b"PK\x03\x04" or start[:2] == b"\x80\x02":
                raise CheckpointError(
                    f"{path} is a PyTorch pickle file, which can run code when it is read; FastUSP reads safetensors "
                    "and GGUF. Convert it to safetensors"
                )
            else:
                tensors, metadata = _safetensors(file, int.from_bytes(start, "little"), length)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no model file {path}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read the model file {path}: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise _unreadable(path, str(error)) from error
    for name, info in tensors.items():
        if info.dtype is not None and (end := info.start + info.size) > length:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r} ends at byte {end}, the file at byte {length}. Download it again"
            )
    return tensors, metadata


def _safetensors(file, size: int, length: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    if not 2 <= size <= min(_LONGEST_HEADER, length - 8):
        raise ValueError(f"its header would have {size} bytes, the file has {length}")
    header = json.loads(file.read(size))
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        kind, (start, stop) = entry["dtype"], entry["data_offsets"]
        dtype = _SAFETENSORS.get(kind)
        info = TensorInfo(
            tuple(map(int, entry["shape"])), dtype, 8 + size + start, unknown="" if dtype is not None else str(kind)
        )
        if start < 0 or dtype is not None and stop - start != info.size:
            raise ValueError(f"tensor {name!r} has {stop - start} bytes, its shape {info.shape} takes {info.size}")
        tensors[name] = info
    return tensors, metadata


def _gguf(file, length: int) -> dict[str, TensorInfo]:
    tensors = {}
    for name, kind, shape, start in gguf_header(file, length):
        packing = kind if kind in PACKINGS else ""
        dtype = torch.float32 if packing else _GGUF.get(kind)
        if packing and (not shape or shape[-1] % PACKINGS[packing][0]):
            raise ValueError(f"tensor {name!r} of shape {shape} is no whole number of {kind}'s blocks")
        tensors[name] = TensorInfo(shape, dtype, start, packing, unknown="" if dtype is not None else f"GGUF {kind}")
    return tensors


def _unreadable(path: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read as safetensors or GGUF ({why}): it is truncated, corrupt or of another format. "
        "Download it again, or convert it to safetensors"
    )
