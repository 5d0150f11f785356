"""A file is the one that is meant where name, size and contents are."""

import os
import socket

import pytest
from support import SOME_FILE

from fastusp_backend.config import FileState, ModelSpec
from fastusp_backend.errors import CheckpointError
from fastusp_backend.library import BLOCK_BYTES, HEAD_BYTES, MODELS_VARIABLE, fingerprint, located, named

pytestmark = pytest.mark.unit


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "client" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(os.urandom(1 << 16) * 90)
    return path


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    folder = tmp_path / "server"
    (folder / "inside").mkdir(parents=True)
    monkeypatch.setenv(MODELS_VARIABLE, f"{tmp_path}/gone{os.pathsep}{folder}")
    return folder / "inside" / "model.safetensors"


def spec_of(path) -> ModelSpec:
    return ModelSpec.of_file(str(path), storage="bfloat16", compute="bfloat16")


def test_it_is_found_by_its_name_in_folders_inside(file, theirs):
    sent = named(spec_of(file))
    assert sent.path == "model.safetensors" and sent.file.size == file.stat().st_size and len(sent.fingerprint) == 64
    theirs.write_bytes(file.read_bytes())
    assert located(sent) == spec_of(theirs)
    assert located(spec_of(file)) == spec_of(file)


def test_links_that_make_a_ring(file, theirs):
    for name in ("one", "two", "three"):
        (theirs.parent / name).symlink_to(theirs.parent.parent)
    sent = named(spec_of(file))
    with pytest.raises(CheckpointError, match="looked in"):
        located(sent)
    theirs.write_bytes(file.read_bytes())
    assert located(sent) == spec_of(theirs)


def test_a_machine_without_it_names_where_it_looked(file, theirs, monkeypatch):
    sent = named(spec_of(file))
    with pytest.raises(CheckpointError) as raised:
        located(sent)
    told = str(raised.value)
    assert told.startswith(f"Copy model.safetensors ({sent.file.size} bytes) to {socket.gethostname()}")
    assert told.endswith(f"looked in {os.environ[MODELS_VARIABLE].replace(os.pathsep, ', ')}")
    monkeypatch.delenv(MODELS_VARIABLE)
    with pytest.raises(CheckpointError, match="it was given no folder"):
        located(sent)


@pytest.mark.parametrize("place", ["beginning", "end", "size"])
def test_another_one_is_named(file, theirs, place):
    data = bytearray(file.read_bytes())
    data[0 if place == "beginning" else -1] ^= 1
    theirs.write_bytes(bytes(data) + b"\0" * (place == "size"))
    told = f"{len(data) + 1} bytes" if place == "size" else "other contents"
    with pytest.raises(CheckpointError, match=rf"there, {theirs} is another file \({told}\)$"):
        located(named(spec_of(file)))


def test_samples_are_spread_over_the_file(tmp_path):
    path, size = tmp_path / "large", HEAD_BYTES + 1000 * BLOCK_BYTES
    with open(path, "wb") as sparse:
        sparse.truncate(size)
    state = FileState.of(path.stat())
    before = fingerprint(str(path), state)
    for block in range(0, size - (1 << 20), size // 16):
        with open(path, "r+b") as sparse:
            sparse.seek(block)
            sparse.write(b"\1" * (2 * size // 64))
        changed = fingerprint(str(path), FileState.of(path.stat()))
        assert changed != before
        before = changed


def test_one_that_changed_or_went_is_not_sent(file):
    spec = spec_of(file)
    os.utime(file, (1, 1))
    with pytest.raises(CheckpointError, match="^Queue the prompt again: .* was changed since this workflow loaded it"):
        named(spec)
    file.unlink()
    with pytest.raises(CheckpointError, match="^Choose another file: .*No such file"):
        named(spec)


def test_what_is_sent_says_nothing_of_this_machine(file):
    sent = named(spec_of(file))
    assert "/" not in sent.path and sent.file == FileState(0, 0, sent.file.size, 0) and sent.file != SOME_FILE
