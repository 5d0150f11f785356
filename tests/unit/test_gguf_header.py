"""The header of GGUF files, against the package `gguf`, and files that lie."""

import gguf
import pytest
from formats import HALVES, write

from fastusp_backend.weights import gguf_header as module
from fastusp_backend.weights.gguf_header import gguf_header

pytestmark = pytest.mark.unit


def read(data: bytes) -> list:
    return list(gguf_header(lambda start, count: data[start : start + count], len(data)))


def number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little")


def string(text: str) -> bytes:
    return number(len(text)) + text.encode()


def file(*, version: int = 3, pairs: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = ()) -> bytes:
    return b"GGUF" + number(version, 4) + number(len(tensors)) + number(len(pairs)) + b"".join([*pairs, *tensors])


def tensor(name: str, shape: tuple[int, ...] = (4, 2), kind: int = 0, start: int = 0) -> bytes:
    dims = b"".join(map(number, shape))
    return string(name) + number(len(shape), 4) + dims + number(kind, 4) + number(start)


def test_the_numbers_of_types_are_ggmls():
    assert module._TYPES == {kind.value: kind.name for kind in gguf.GGMLQuantizationType if kind in module._TYPES}
    assert HALVES.keys() <= set(module._TYPES.values())


@pytest.mark.parametrize("name", ["gguf_Q8_0", "gguf_Q4_K"])
@pytest.mark.parametrize("alignment", [32, 256])
def test_a_header_is_what_the_package_reads(mini, tmp_path, monkeypatch, name, alignment):
    path, begin = tmp_path / "x.gguf", gguf.GGUFWriter.write_header_to_file

    def with_metadata(writer):
        writer.add_custom_alignment(alignment)
        writer.add_string("general.name", "größer")
        writer.add_array("tokens", ["a", "", "ccc"])
        writer.add_array("flags", [True, False])
        writer.add_float64("scale", 0.5)
        writer.add_uint8("byte", 3)
        begin(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_metadata)
    write(name, mini, path)
    wanted = [
        (t.name, t.tensor_type.name, tuple(reversed(t.shape.tolist())), int(t.data_offset))
        for t in gguf.GGUFReader(path).tensors
    ]
    assert read(path.read_bytes()) == wanted and len(wanted) > 20


def test_arrays_within_arrays_are_passed():
    inner = number(4, 4) + number(2) + bytes(8)
    nested = string("nested") + number(9, 4) + number(9, 4) + number(2) + inner + inner
    ((name, kind, shape, start),) = read(file(pairs=(nested,), tensors=(tensor("x", kind=4242),)) + bytes(64))
    assert (name, kind, shape) == ("x", "type 4242", (2, 4)) and start % 32 == 0


@pytest.mark.parametrize(
    "data, words",
    [
        (file(version=1), "GGUF of version 1, expected one of"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(16), "version 50331648"),
        (file(tensors=(tensor("x"), tensor("x"))), "two tensors 'x'"),
        (file(tensors=(tensor("x")[:-1],)), "goes on beyond"),
        (b"GGUF" + number(3, 4) + number(1 << 60) + number(0), "^has 1152921504606846976 tensors, FastUSP reads up to"),
        (file(pairs=(string("k") + number(8, 4) + number(1 << 62),)), "goes on beyond"),
        (file(pairs=(string("k") + number(9, 4) + number(10, 4) + number(1 << 61),)), "goes on beyond"),
        (file(pairs=(string("k") + number(77, 4),)), "type 77"),
        (
            file(tensors=(string("x") + number(1 << 31, 4),)) + bytes(99),
            "'x' has 2147483648 dimensions, GGUF knows up to",
        ),
        (
            file(pairs=(string("k") + number(9, 4) + number(8, 4) + number(1 << 40),)) + bytes(17 << 20),
            "more values of metadata than the 1000000 that",
        ),
        (
            file(pairs=(string("k") + number(9, 4) + 6 * (number(9, 4) + number(1)) + number(4, 4) + number(0),)),
            "^has arrays within arrays in its metadata, FastUSP reads them up to 4 deep",
        ),
        (file(tensors=(tensor("x", start=8),)) + bytes(99), "'x' begins at 8, which is not a multiple of"),
        (file(pairs=(string("general.alignment") + number(4, 4) + number(24, 4),)), "24, is not a power of two"),
        (file(pairs=(string("general.alignment") + number(4, 4) + number(0, 4),)), "0, is not a power of two"),
    ],
)
def test_files_that_lie_are_refused(data, words):
    with pytest.raises(ValueError, match=words):
        read(data)
