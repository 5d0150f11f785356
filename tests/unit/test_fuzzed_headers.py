"""Headers with random damage: read, or refused with a CheckpointError, and soon."""

import json
import math
import os
import random
import time
import weakref
from collections import Counter

import pytest
from formats import write
from support import SMALL_CHROMA, SMALL_FLUX2, SMALL_QWEN, SMALL_SD3, SMALL_Z_IMAGE

from fastusp_backend.errors import CheckpointError
from fastusp_backend.models.files import read_model
from fastusp_backend.models.synthetic import write_checkpoint

pytestmark = pytest.mark.unit

OTHERS = {"flux2": SMALL_FLUX2, "chroma": SMALL_CHROMA, "qwen": SMALL_QWEN, "sd3": SMALL_SD3, "z_image": SMALL_Z_IMAGE}

SOON = 5.0
"""Seconds for a file, of which each takes some thousandths."""

LARGE = 1 << 40
SIZES = {
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "U8": 1,
    "I8": 1,
    "F4": 1,
    "BOOL": 1,
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    "I32": 4,
    "I64": 8,
}
SHAPES = ((), (0,), (1,), (4096,), (4097,), (2, 0), (0, 2**62), (2**62, 0), (1,) * 5, (1,) * 9, (0,) * 9, (128, 128))
NUMBERS = (0, 1, 2, 127, 2**24 + 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 10**400)
ODD = (*NUMBERS, -1, None, True, 1.5, 4.0, 1e400, float("nan"), "", "4", "\ud800", [], {}, [[]], [None], {"a": 1})
NAMES = ("", ".", "img_in", "img_in.weight.", "double_blocks", "double_blocks.", "double_blocks.0.", "scaled_fp8", "é")
NAMES += ("double_blocks.999999.img_attn.qkv.weight", "double_blocks.1" + "0" * 5000 + ".img_mlp.0.bias", "a." * 200)
NAMES += ("double_blocks.-1.img_mlp.0.bias", "double_blocks.\u0663.img_mlp.0.bias", "x" * 100_000, "\ud800", "\0")
NAMES += ("transformer_blocks.0.img_mod.1.weight", "img_in.qweight", "img_in.weight.absmax", "__metadata__")
LEAVES = (".comfy_quant", ".weight_scale", ".scale_weight", ".input_scale", ".weight", ".weight.quant_map", "")


class Memory:
    """A file without a disk, which would take longer than all else."""

    def __init__(self):
        self._descriptor = os.memfd_create("header")
        weakref.finalize(self, os.close, self._descriptor)
        self.path = f"/proc/self/fd/{self._descriptor}"

    def write(self, parts: dict[int, bytes], size: int) -> None:
        """Some bytes, by where they begin; zeros between them."""
        os.ftruncate(self._descriptor, 0)
        for start, data in parts.items():
            os.pwrite(self._descriptor, data, start)
        os.ftruncate(self._descriptor, size)

    def outcome(self) -> str:
        start = time.monotonic()
        try:
            read_model(self.path)
            kind = "read"
        except CheckpointError as error:
            assert len(str(error)) < 5000
            str(error).encode()  # it travels between ranks
            kind = "refused"
        assert time.monotonic() - start < SOON
        return kind


def other_tensors(tensors: dict, chance: random.Random) -> dict:
    """Some other names, types and shapes."""
    tensors = dict(tensors)
    for _ in range(chance.choice((0, 1, 1, 2, 5))):
        name = chance.choice(list(tensors))
        kind, shape = tensors[name]
        what = chance.randrange(6)
        if what == 0:
            del tensors[name]
        elif what == 1:
            tensors[chance.choice(NAMES)] = tensors.pop(name)
        elif what == 2:
            tensors[name.rpartition(".")[0] + chance.choice(LEAVES)] = chance.choice(list(SIZES)), chance.choice(SHAPES)
        elif what == 3:
            tensors[name] = chance.choice(list(SIZES)), shape
        elif what == 4:
            tensors[name] = kind, chance.choice(SHAPES)
        elif shape:
            place = chance.randrange(len(shape))
            tensors[name] = kind, (*shape[:place], chance.choice(NUMBERS[:5]), *shape[place + 1 :])
    return tensors


def odd_values(header: dict, chance: random.Random) -> None:
    """Some of what the format does not know, where its values were."""
    for _ in range(chance.choice((0, 0, 1, 2))):
        name = chance.choice(list(header))
        where, key = chance.choice(((header, name), (header[name], chance.choice(("dtype", "shape", "data_offsets")))))
        inner = where.get(key) if isinstance(where, dict) else None
        if isinstance(inner, list) and inner and chance.random() < 0.7:
            inner[chance.randrange(len(inner))] = chance.choice(ODD)
        elif isinstance(where, dict):
            where[key] = chance.choice(ODD)
    if chance.random() < 0.2:
        layers = {name.removesuffix(".weight"): chance.choice(ODD) for name in list(header)[:3]}
        said = json.dumps({"layers": chance.choice((layers, *ODD))})
        header["__metadata__"] = chance.choice(({"_quantization_metadata": said}, {"a": "b"}, *ODD))


def damaged(data: bytes, start: int, stop: int, chance: random.Random) -> bytes:
    """With other bytes, or some more or fewer, between two places."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place, width = chance.randrange(start, min(stop, len(data))), chance.choice((4, 8))
        what = chance.randrange(4)
        if what == 0:
            data[place] = chance.randrange(256)
        elif what == 1:
            data[place : place + width] = (chance.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
        elif what == 2:
            del data[place : place + chance.randrange(20)]
        else:
            data[place:place] = data[place : place + chance.randrange(200)]
    return bytes(data)


@pytest.mark.parametrize("times", [200, pytest.param(500, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", ["flux", *OTHERS, "scaled_old", "scaled_tensors", "mixed", "all_in_one"])
def test_safetensors(mini, tmp_path, name, times):
    path = tmp_path / "x.safetensors"
    if name == "flux":
        path.write_bytes(mini.read_bytes())
    elif name in OTHERS:
        write_checkpoint(str(path), OTHERS[name])
    else:
        write(name, mini, path)
    data, chance, seen, file = path.read_bytes(), random.Random(name), Counter(), Memory()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    tensors = {key: (entry["dtype"], tuple(entry["shape"])) for key, entry in header.items()}
    small = {key: data[begin:][slice(*e["data_offsets"])] for key, e in header.items() if math.prod(e["shape"]) < 99}
    for _ in range(times):
        header, end, body = {}, 0, {}
        for key, (kind, shape) in other_tensors(tensors, chance).items():
            start, end = end, end + math.prod(shape) * SIZES[kind]
            header[key] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
            body[start] = small.get(key, b"?" * min(end - start, 8))  # scales must be numbers
        odd_values(header, chance)
        text = json.dumps(header, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
        if chance.random() < 0.2:
            text = damaged(text, 0, len(text), chance)
        length = len(text) if chance.random() < 0.9 else chance.choice(NUMBERS) % (1 << 64)
        parts = {8 + len(text) + start: content for start, content in body.items() if start < LARGE}
        parts[0] = length.to_bytes(8, "little") + text
        file.write(parts, 8 + len(text) + min(end, LARGE) - (chance.random() < 0.1))
        seen[file.outcome()] += 1
    assert seen["read"] > times / 50 and seen["refused"] > times / 5, seen


def test_gguf(mini, tmp_path):
    chance, path, seen, file = random.Random(0), tmp_path / "x.gguf", Counter(), Memory()
    write("gguf_Q8_0", mini, path)
    data = path.read_bytes()
    end = data.rindex(b"single_blocks") + 50
    for _ in range(2000):
        file.write({0: damaged(data[: end + 4096], 4, end, chance)}, len(data) + 4096)
        seen[file.outcome()] += 1
    assert seen["read"] > 10 and seen["refused"] > 1000, seen
