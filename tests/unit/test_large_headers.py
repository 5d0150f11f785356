"""Small files that would take long, or much memory, and files that lie: refused at once, by what is wrong."""

import json
import os
import time
from dataclasses import replace

import pytest
import torch
from formats import MINI, write
from safetensors.torch import load_file

from fastusp_backend.errors import CheckpointError
from fastusp_backend.models.files import read_model
from fastusp_backend.models.synthetic import write_checkpoint

pytestmark = pytest.mark.unit

SOON = 5.0
"""Seconds; the slowest takes half of one where nothing else runs."""
LAYER = "single_blocks.0.linear1"
A = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def sparse(path, header: dict | bytes, size: int) -> None:
    """A safetensors file with so many bytes of data, zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + size)


def many(names) -> tuple[dict, int]:
    """A header with tensors of these names, of four bytes each, and the bytes of them all."""
    header = {name: {**A, "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
    return header, 4 * len(header)


def refusal(path) -> str:
    start = time.monotonic()
    with pytest.raises(CheckpointError) as refused:
        read_model(str(path))
    assert time.monotonic() - start < SOON
    assert len(str(refused.value)) < 2000
    return str(refused.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    "names, words",
    [
        ((f"t.{i}" for i in range(150_000)), "Use another file: {path} has 150000 tensors, FastUSP reads up to 50000"),
        ((f"some.block.{i}.weight" for i in range(50_000)), "is not a FLUX.2 or Chroma or FLUX.1 or Qwen-Image or "),
        ((f"{'a.' * 110}{i}.qweight" for i in range(10_000)), "quantised as GPTQ or AWQ"),
        (
            [f"double_blocks.{i}.img_mlp.0.bias" for i in range(20_000)]
            + [f"single_blocks.{i}.x" for i in range(20_000)],
            "Use another file than {path}: it has 19999 double_blocks, no model",
        ),
        (["x" * 257], "Use another file: {path} has a tensor name of 257 characters, 'xxx"),
        ([f"double_blocks.{'9' * 200}.img_mlp.0.bias"], "is not a FLUX.2"),
    ],
    ids=["tensors", "other blocks", "long names", "blocks", "name", "number"],
)
def test_names(path, names, words):
    sparse(path, *many(names))
    text = refusal(path)
    assert words.format(path=path) in text and "Download" not in text


@pytest.mark.parametrize("leaf", [".SCB", ".img_attn.qkv.weight"])
def test_a_whole_model_and_as_many_names_again(path, mini, leaf):
    """Whatever lies beside a model, it is read as soon."""
    state = load_file(mini)
    start, header = 0, {}
    for name, tensor in state.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, start + tensor.nbytes]}
        start += tensor.nbytes
    for i in range(10_000):
        header[f"{'a.' * 110}{i}{leaf}"] = {**A, "data_offsets": [start, start + 4]}
        start += 4
    sparse(path, header, start)
    began = time.monotonic()
    assert len(read_model(str(path)).ignored) == 10_000
    assert time.monotonic() - began < SOON


@pytest.mark.parametrize(
    "inner",
    [b"[],", b"{},", b"1,", b"1e5,", b"[", b'{"":', b'"a":{},'],
    ids=["lists", "objects", "numbers", "fractions", "deep lists", "deep objects", "entries"],
)
def test_what_is_no_header_takes_no_time(path, inner):
    begin = b"{" if inner == b'"a":{},' else b'{"a":['
    sparse(path, begin + inner * ((15 << 20) // len(inner)), 0)
    assert "cannot be read as safetensors or GGUF" in refusal(path)


def test_a_header_is_not_read_where_it_is_too_long(path):
    with open(path, "wb") as file:
        file.write(((16 << 20) + 1).to_bytes(8, "little") + b"{")
        file.truncate(1 << 33)
    assert refusal(path) == f"Use another file: {path} has a header of 16777217 bytes, FastUSP reads up to 16777216"


def test_a_gguf_header_that_is_too_long(path):
    """Though the file is whole."""
    path.write_bytes(b"GGUF" + b"".join(n.to_bytes(size, "little") for n, size in [(3, 4), (0, 8), (1, 8), (1, 8)]))
    with open(path, "ab") as file:
        file.write(b"k" + (8).to_bytes(4, "little") + (17 << 20).to_bytes(8, "little"))
        file.truncate(20 << 20)
    text = refusal(path)
    assert text.startswith(f"Use another file: {path} has a header of 178") and text.endswith("up to 16777216")


@pytest.mark.parametrize("count", [9, 7_000_000], ids=str)
def test_more_dimensions_than_any_tensor_has(path, count):
    sparse(path, json.dumps({"a": {**A, "shape": [1] * count}}, separators=(",", ":")).encode(), 4)
    wanted = f"Use another file: {path} has a tensor of {count} dimensions, 'a', FastUSP reads up to 8"
    assert refusal(path) == wanted


@pytest.mark.parametrize(
    "change, words",
    [
        ({"data_offsets": [0.0, 4.0]}, "tensor 'a': Expected `int`, got `float` - at `$.data_offsets[0]`"),
        ({"data_offsets": [-4, 0]}, "tensor 'a': Expected `int` >= 0 - at `$.data_offsets[0]`"),
        ({"data_offsets": [False, 4]}, "got `bool`"),
        ({"data_offsets": [0, 2**64]}, "tensor 'a': "),
        ({"data_offsets": [0, 4, 8]}, "tensor 'a': Expected `array` of length 2"),
        ({"data_offsets": [4, 0]}, "tensor 'a' has -4 bytes, its shape (1,) takes 4"),
        ({"data_offsets": [4, 8]}, "tensor 'a' begins at byte"),
        ({"shape": ["1"]}, "got `str` - at `$.shape[0]`"),
        ({"shape": [float("nan")]}, "JSON is malformed"),
        ({"shape": [10**400]}, "tensor 'a': "),
        ({"shape": [2**62, 2**62]}, "its shape"),
        ({"dtype": ["F32"]}, "tensor 'a': Expected `str`, got `array`"),
        ({"dtype": "F" * 33}, "tensor 'a': Expected `str` of length <= 32"),
    ],
)
def test_values_that_are_none(path, change, words):
    sparse(path, {"a": {**A, **change}}, 4)
    assert words in refusal(path)


@pytest.mark.parametrize(
    "text, size, words",
    [
        ('{"a":%s,"a":%s}', 8, "begins at byte"),  # the first one is hidden
        ('{"a":%s,"b":%s}', 12, "its last tensor ends at byte"),
        ('{"a":%s,"b":%s,"\\ud800":%s}', 12, "surrogate"),
        ('{"a":%s,"__metadata__":{"x":1}}', 4, "its metadata: Expected `str`, got `int`"),
        ('{"a":%s,"__metadata__":[]}', 4, "its metadata: Expected `object | null`, got `array`"),
        ('{"a":%s}}', 4, "JSON is malformed"),
    ],
)
def test_headers_that_contradict_themselves(path, text, size, words):
    entries = [json.dumps({**A, "data_offsets": [4 * i, 4 * i + 4]}) for i in range(text.count("%s"))]
    sparse(path, (text % tuple(entries)).encode(), size)
    assert words in refusal(path)


def test_two_tensors_in_one_place(path):
    sparse(path, {"a": A, "b": A}, 4)
    assert "tensor 'b' begins at byte" in refusal(path)


def test_two_gguf_tensors_in_one_place(mini, tmp_path):
    path = tmp_path / "x.gguf"
    write("gguf_Q8_0", mini, path)
    data, key = bytearray(path.read_bytes()), b"img_in.weight"
    after = data.index(key) + len(key)
    offset = after + 4 + 8 * data[after] + 4
    data[offset : offset + 8] = bytes(8)
    path.write_bytes(data)
    assert "within another that ends at" in refusal(path)


@pytest.mark.parametrize("name", ["img_in.weight", "double_blocks.0.img_mlp.0.weight", "txt_in.weight"])
@pytest.mark.parametrize("shape", [(0, 2**62), (2**62, 0), (2**25, 1)])
def test_sizes_that_no_model_has(path, mini, name, shape):
    """Of zero bytes, they would cost nothing to write."""
    state = {key: torch.empty(t.shape, device="meta") for key, t in load_file(mini).items()}
    start, header = 0, {}
    for key, tensor in state.items():
        sizes = list(shape if key == name else tensor.shape)
        size = 4 * torch.Size(sizes).numel()
        header[key] = {"dtype": "F32", "shape": sizes, "data_offsets": [start, start + size]}
        start += size
    sparse(path, header, start)
    assert f"tensor '{name}' is {shape}, expected a matrix of up to 16777216" in refusal(path)


@pytest.mark.parametrize("kind, size", [("U8", 1 << 33), ("U8", 4097), ("F32", 1)])
def test_a_mark_that_is_no_mark_is_not_read(path, mini, kind, size):
    data = mini.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    end = len(body) + size * (4 if kind == "F32" else 1)
    header[f"{LAYER}.comfy_quant"] = {"dtype": kind, "shape": [size], "data_offsets": [len(body), end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    os.truncate(path, 8 + len(text) + end)
    text = refusal(path)
    assert f"what it says of the quantisation of '{LAYER}' is malformed" in text and "up to 4096 bytes" in text


def test_more_blocks_than_any_model_has(tmp_path):
    path = tmp_path / "deep.safetensors"
    deep = replace(MINI, hidden=128, heads=1, mlp=8, context=8, pooled=8, double_blocks=1, single_blocks=201)
    write_checkpoint(str(path), deep, dtype=torch.bfloat16)
    assert "it has 201 single_blocks" in refusal(path)
