"""What lies before the data of a GGUF file (github.com/ggml-org/ggml, docs/gguf.md): little-endian, versions 2 and 3.

Read here and not by the package `gguf`, which refuses a file for one tensor of a type that is newer than itself.
"""

from collections.abc import Callable, Iterator

import torch

from .gguf_blocks import BLOCKS
from .limits import (
    DEEPEST_ARRAYS,
    LONGEST_HEADER,
    MOST_METADATA_VALUES,
    TooLarge,
    check_count,
    check_length,
    check_name,
)
from .tensor_info import TensorInfo

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
"""The names of ggml's types, by their numbers in files."""
_FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the types of metadata that always take as many."""
_UINT32, _STRING, _ARRAY = 4, 8, 9
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
"""The format's own bound, below that of limits.py."""
_FIRST_READ = 256 << 10


def gguf_header(read: Callable[[int, int], bytes], length: int) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Name, type, shape (rows first) and first byte of each tensor of a GGUF file of `length` bytes; read(start, count)
    gives some of them. A type that has no name here is 'type' and its number.

    Raises ValueError for a file that is cut short, of another version, or contradicts itself; TooLarge for one whose
    header is larger than any model's.
    """
    header = _Header(read, length)
    header.skip_bytes(4)
    version = header.number(4)
    if version not in _VERSIONS:
        raise ValueError(f"it is GGUF of version {version}, expected one of {_VERSIONS}, little-endian")
    count, pairs = header.number(8), header.number(8)
    check_count(count)
    alignment = 32
    for _ in range(pairs):
        key, kind = header.string(), header.number(4)
        if key == "general.alignment":
            if kind != _UINT32:
                raise ValueError(f"its alignment is a value of type {kind}, expected {_UINT32}")
            alignment = header.number(4)
        else:
            header.skip(kind)
    if alignment < 1 or alignment & alignment - 1:
        raise ValueError(f"its alignment, {alignment}, is not a power of two")
    tensors = {}
    for _ in range(count):
        name = header.string()
        check_name(name)
        if name in tensors:
            raise ValueError(f"it has two tensors {name!r}")
        dimensions = header.number(4)
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions, GGUF knows up to {_MOST_DIMENSIONS}")
        shape = tuple(reversed([header.number(8) for _ in range(dimensions)]))
        kind, offset = header.number(4), header.number(8)
        if offset % alignment:
            raise ValueError(
                f"tensor {name!r} begins at {offset}, which is not a multiple of the alignment, {alignment}"
            )
        tensors[name] = _TYPES.get(kind, f"type {kind}"), shape, offset
    data = -(-header.place // alignment) * alignment
    for name, (kind, shape, offset) in tensors.items():
        yield name, kind, shape, data + offset


def gguf_tensors(read: Callable[[int, int], bytes], length: int) -> dict[str, TensorInfo]:
    """The tensors of a GGUF file, otherwise as `gguf_header`, which raises for it. Raises ValueError also where tensors
    overlap or are no whole blocks."""
    tensors = {}
    for name, kind, shape, start in gguf_header(read, length):
        packing = kind if kind in BLOCKS else ""
        dtype = torch.float32 if packing else _DTYPES.get(kind)
        if packing and (not shape or shape[-1] % BLOCKS[packing].values):
            raise ValueError(f"tensor {name!r} of shape {shape} is not a whole number of {kind}'s blocks")
        tensors[name] = TensorInfo(shape, dtype, start, packing, unknown="" if dtype is not None else f"GGUF {kind}")
    end = 0
    for start, size, name in sorted((x.start, x.size, name) for name, x in tensors.items() if x.dtype is not None):
        if start < end:
            raise ValueError(f"tensor {name!r} begins at byte {start}, within another that ends at {end}")
        end = start + size
    return tensors


class _Header:
    """The values in the header of a file of `length` bytes, one after the other. place: where the next one begins."""

    def __init__(self, read: Callable[[int, int], bytes], length: int):
        self._read, self._length = read, length
        self._data, self.place = b"", 0
        self._left = MOST_METADATA_VALUES

    def number(self, size: int) -> int:
        return int.from_bytes(self._bytes(size), "little")

    def string(self) -> str:
        return self._bytes(self.number(8)).decode()

    def skip(self, kind: int, depth: int = 0) -> None:
        """Passes a value of metadata of this type."""
        self._left -= 1
        if self._left < 0:
            raise TooLarge(f"has more values of metadata than the {MOST_METADATA_VALUES} that FastUSP reads")
        if kind in _FIXED:
            self.skip_bytes(_FIXED[kind])
        elif kind == _STRING:
            self.skip_bytes(self.number(8))
        elif kind == _ARRAY:
            kind, count = self.number(4), self.number(8)
            if kind in _FIXED:
                self.skip_bytes(_FIXED[kind] * count)
            elif depth == DEEPEST_ARRAYS:
                raise TooLarge(
                    f"has arrays within arrays in its metadata, FastUSP reads them up to {DEEPEST_ARRAYS} deep"
                )
            else:
                for _ in range(count):
                    self.skip(kind, depth + 1)
        else:
            raise ValueError(f"its metadata has a value of type {kind}, which GGUF does not know")

    def skip_bytes(self, size: int) -> None:
        """Passes so many bytes, which are there."""
        end = self.place + size
        if end > self._length:
            raise ValueError(f"its header goes on beyond its {self._length} bytes")
        check_length(end)  # at least
        if end > len(self._data):
            wanted = min(self._length, LONGEST_HEADER, max(end, 2 * len(self._data), _FIRST_READ))
            self._data += self._read(len(self._data), wanted - len(self._data))
        self.place = end

    def _bytes(self, size: int) -> bytes:
        self.skip_bytes(size)
        return self._data[self.place - size : self.place]
