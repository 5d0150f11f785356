"""A ModelSpec names a file's state; descriptions are frozen, comparable and survive their wire form."""

import os

import msgspec
import pytest
from support import SOME_FILE

from fastusp_backend.config import Layout, ModelSpec, Settings
from fastusp_backend.errors import CheckpointError

pytestmark = pytest.mark.unit

FILE = msgspec.structs.asdict(SOME_FILE)


def test_a_spec_is_absolute_and_follows_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").write_bytes(b"one")
    spec = ModelSpec.of_file("model", storage="bfloat16", compute="float32")
    assert spec.path == str(tmp_path / "model")
    assert spec.file.size == 3
    assert spec == ModelSpec.of_file(spec.path, storage="bfloat16", compute="float32")
    os.utime(spec.path, ns=(spec.file.mtime_ns, spec.file.mtime_ns + 1))
    assert spec != ModelSpec.of_file(spec.path, storage="bfloat16", compute="float32")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nothing.safetensors: No such file"):
        ModelSpec.of_file(str(tmp_path / "nothing.safetensors"), storage=None, compute="float32")


@pytest.mark.parametrize(
    "value",
    [
        Layout(ulysses=2, ring=3),
        Settings(wire="exact", attention="math"),
        ModelSpec(path="/a", file=SOME_FILE, storage=None, compute="bfloat16"),
    ],
)
def test_wire_form(value):
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value)) == value
    assert hash(value) == hash(msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value)))
    with pytest.raises(AttributeError):
        setattr(value, value.__struct_fields__[0], 1)


@pytest.mark.parametrize(
    "kind, fields",
    [
        (Settings, {"attention": "sage3"}),
        (Settings, {"wire": "fp4"}),
        (Layout, {"ulysses": 0, "ring": 1}),
        (Layout, {"ulysses": "2", "ring": 1}),
        (ModelSpec, {"path": "/a", "file": FILE, "storage": "int4", "compute": "float32"}),
        (ModelSpec, {"path": "/a", "file": FILE, "storage": None, "compute": None}),
    ],
)
def test_values_that_do_not_exist_are_refused_on_arrival(kind, fields):
    with pytest.raises(ValueError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=kind)


def test_what_is_in_8_bits_in_words():
    lossy = Settings(wire="int8", linear="fp8", attention="sage", compile=False)
    assert lossy.eight_bits == "wire int8, linear fp8, attention sage"
    assert Settings(attention="math", cache="easy", compile=False).eight_bits == ""
