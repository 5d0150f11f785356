"""What lies before the data of a GGUF file (github.com/ggml-org/ggml, docs/gguf.md): little-endian, versions 2 and 3.

Read here and not by the package `gguf`, which refuses a file for one tensor of a type that is newer than itself.
"""

import os
from collections.abc import Iterator
from typing import BinaryIO

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
_LONGEST = 16 << 20
"""Bytes of a header. Those of image models take some 100 KB, and reading goes at about 10 MB/s."""


def gguf_header(file: BinaryIO, length: int) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Name, type, shape (rows first) and first byte of each tensor of a GGUF file of `length` bytes. A type that has no
    name here is 'type' and its number.

    Raises ValueError for a file that is cut short, of another version, or contradicts itself.
    """
    file.seek(4)
    header = _Header(file, min(length, _LONGEST))
    version = header.number(4)
    if version not in _VERSIONS:
        raise ValueError(f"it is GGUF of version {version}, expected one of {_VERSIONS}, little-endian")
    count, pairs = header.number(8), header.number(8)
    alignment = 32
    for _ in range(pairs):
        key, kind = header.string(), header.number(4)
        if key == "general.alignment" and kind == _UINT32:
            alignment = header.number(4)
        else:
            header.skip(kind)
    if alignment < 1 or alignment & alignment - 1:
        raise ValueError(f"its alignment, {alignment}, is no power of two")
    tensors = {}
    for _ in range(count):
        name = header.string()
        if name in tensors:
            raise ValueError(f"it has two tensors {name!r}")
        dimensions = header.number(4)
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions, GGUF knows up to {_MOST_DIMENSIONS}")
        shape = tuple(reversed([header.number(8) for _ in range(dimensions)]))
        kind = header.number(4)
        tensors[name] = _TYPES.get(kind, f"type {kind}"), shape, header.number(8)
    data = -(-file.tell() // alignment) * alignment
    for name, (kind, shape, offset) in tensors.items():
        yield name, kind, shape, data + offset


class _Header:
    """The values in a file, one after the other."""

    def __init__(self, file: BinaryIO, length: int):
        self._file, self._length = file, length

    def number(self, size: int) -> int:
        return int.from_bytes(self._bytes(size), "little")

    def string(self) -> str:
        return self._bytes(self.number(8)).decode()

    def skip(self, kind: int) -> None:
        """Passes a value of metadata of this type."""
        if kind in _FIXED:
            self._pass(_FIXED[kind])
        elif kind == _STRING:
            self._pass(self.number(8))
        elif kind == _ARRAY:
            kind, count = self.number(4), self.number(8)
            if kind in _FIXED:
                self._pass(_FIXED[kind] * count)
            else:
                for _ in range(count):
                    self.skip(kind)
        else:
            raise ValueError(f"its metadata has a value of type {kind}, which GGUF does not know")

    def _bytes(self, size: int) -> bytes:
        self._check(size)
        return self._file.read(size)

    def _pass(self, size: int) -> None:
        self._check(size)
        self._file.seek(size, os.SEEK_CUR)

    def _check(self, size: int) -> None:
        if size > self._length - self._file.tell():
            raise ValueError(f"its header goes on beyond {self._length} bytes, of the file or of any header")
