"""Files that change while they are read or after that: what is loaded is one state of one file, or is refused."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import SMALL, load_model, spec_of

from fastusp_backend import config
from fastusp_backend.config import FileState, ModelSpec
from fastusp_backend.engine import Engine
from fastusp_backend.engine.checkpoint import Checkpoint
from fastusp_backend.errors import CheckpointError
from fastusp_backend.models import files
from fastusp_backend.models.files import read_model
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool.cause import hint

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
MINI = replace(SMALL, hidden=128, heads=1, mlp=256, double_blocks=1, single_blocks=1)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    write_checkpoint(str(path), MINI, seed=1)
    return path


@pytest.fixture
def other(tmp_path, model):
    """Another model of the same size and time."""
    path = tmp_path / "other.safetensors"
    write_checkpoint(str(path), MINI, seed=2)
    stat = os.stat(model)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return path


def rewrite(path, source=None) -> None:
    """In place: the same file, at another time: the system's clock may stand for some milliseconds."""
    data, stat = (source or path).read_bytes(), os.stat(path)
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def same(model, path) -> bool:
    state = load_file(path)
    return all(torch.equal(t, state[model.file_key(name)]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("how", ["renamed", "linked", "removed"])
def test_weights_come_from_the_file_whose_header_was_read(model, other, tmp_path, how):
    """Whatever is at its path when they are read."""
    if how == "linked":
        model.rename(tmp_path / "first")
        model.symlink_to(tmp_path / "first")
    shutil.copy(model, tmp_path / "kept")
    checkpoint = Checkpoint(spec_of(model))
    model.unlink()
    if how == "renamed":
        other.rename(model)
    elif how == "linked":
        model.symlink_to(other)
    checkpoint.allocate(CPU)
    assert same(checkpoint.read(), tmp_path / "kept")
    checkpoint.check_file()


def test_another_file_of_the_same_size_and_time_is_another_file(model, other, tmp_path):
    """As where times are not kept, or a link leads elsewhere now."""
    link = tmp_path / "link"
    link.symlink_to(model)
    spec = spec_of(link)
    link.unlink()
    link.symlink_to(other)
    assert (spec.file.size, spec.file.mtime_ns) == (spec_of(link).file.size, spec_of(link).file.mtime_ns)
    assert spec != spec_of(link)
    with pytest.raises(
        CheckpointError,
        match=f"^Wait until nothing writes to {link}, then queue the prompt again: it was replaced since this workflow",
    ):
        Checkpoint(spec)


def test_a_spec_names_the_file_that_was_read(model, other, monkeypatch):
    """Not the one that is at its path by then."""
    old = spec_of(model)
    fold = files.fold_scales

    def swap(*args):
        other.rename(model)
        return fold(*args)

    monkeypatch.setattr(files, "fold_scales", swap)
    spec = read_model(str(model)).spec(storage=None, compute="float32")
    assert spec == old != spec_of(model)


@pytest.mark.parametrize("change", [rewrite, lambda path: os.truncate(path, 1000)], ids=["rewritten", "cut"])
def test_a_file_that_changes_while_its_header_is_read(model, monkeypatch, change):
    """That is what is said, not what the header seems to be by then."""
    read = files.read_contents

    def meanwhile(*args):
        change(model)
        return read(*args)

    monkeypatch.setattr(files, "read_contents", meanwhile)
    with pytest.raises(
        CheckpointError, match=r"^Wait until nothing writes to .*: it was (changed|cut short.*) while it was being"
    ):
        read_model(str(model))


def test_a_file_that_is_cut_while_it_is_read(model):
    source = read_model(str(model)).source
    os.truncate(model, 100)
    with pytest.raises(CheckpointError, match="was cut short, from .* to 100 bytes, while it was being read"):
        source.read(200, 4)


@pytest.fixture
def engine(model):
    engine = Engine(CPU)
    engine.describe(spec_of(model))
    engine.make_room()
    return engine


def test_a_file_that_changes_before_its_weights_are_read(model, engine):
    rewrite(model)
    with pytest.raises(CheckpointError, match="was changed since it was loaded"):
        engine.load()
    assert not engine.is_resident(spec_of(model))


def test_a_file_that_is_cut_before_it_is_mapped(model, engine):
    os.truncate(model, 1000)
    with pytest.raises(CheckpointError, match="was cut short"):
        engine.load()


def test_resident_weights_of_a_file_that_was_written_to(model, other, engine):
    """They lie in the file. What is loaded anew is the new one."""
    spec = spec_of(model)
    engine.load()
    assert engine.describe(spec).hidden == 128
    rewrite(model, other)
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=f"writes to {model}, then queue .* it was changed since it was loaded"
        ):
            engine.describe(spec)
    new = spec_of(model)
    assert new != spec
    engine.describe(new)
    engine.make_room()
    engine.load()
    assert engine.describe(new) and same(load_model(new, CPU), other)


def test_resident_weights_of_a_file_that_is_gone(model, other, engine):
    """They are as they were."""
    spec = spec_of(model)
    engine.load()
    other.rename(model)
    assert engine.describe(spec).hidden == 128
    model.unlink()
    assert engine.describe(spec).hidden == 128


def test_parked_weights_do_not_lie_in_the_file(model, engine):
    spec = spec_of(model)
    engine.load()
    engine.park()
    rewrite(model)
    assert engine.describe(spec).hidden == 128


def test_a_model_that_leaves_closes_its_file(model, engine):
    before = len(os.listdir("/proc/self/fd"))
    engine.load()
    engine.release()
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_a_name_that_is_no_text(model, tmp_path):
    """No message could carry it."""
    path = os.path.join(os.fsencode(tmp_path), b"\xff.safetensors")
    os.rename(model, path)
    with pytest.raises(CheckpointError, match=r"^Rename the model file '.*udcff\.safetensors': its name is not UTF-8"):
        read_model(os.fsdecode(path))
    os.rename(path, tmp_path / "全角　スペース.safetensors")
    assert read_model(str(tmp_path / "全角　スペース.safetensors")).config.family == "FLUX.1"


def test_what_became_of_a_file_is_told(model, tmp_path):
    def state() -> FileState:
        return FileState.of(os.stat(model))

    first = state()
    assert first.change_to(state()) == ""
    os.utime(model, ns=(first.mtime_ns, first.mtime_ns + 1))
    assert first.change_to(state()) == "was changed"
    os.truncate(model, 7)
    assert first.change_to(state()) == f"was cut short, from {first.size} to 7 bytes,"
    model.unlink()
    shutil.copy("/proc/self/stat", tmp_path / "occupied")  # or the same inode may be given out again
    model.write_bytes(b"x")
    assert first.change_to(state()) in ("was replaced", f"was cut short, from {first.size} to 1 bytes,")


def test_a_rank_that_sigbus_ended_names_the_file(model):
    spec: ModelSpec = spec_of(model)
    assert hint("SIGABRT", spec) == hint("SIGSEGV", None) == ""
    assert "look at the disk of the room in /dev/shm" in hint("SIGBUS", None)
    assert f"look at the disk of {model} or the room in /dev/shm" in hint("SIGBUS", spec)
    os.truncate(model, 5)
    text = f": {model} was cut short, from {spec.file.size} to 5 bytes, while it was in use; get the whole file again"
    assert hint("SIGBUS", spec) == text
    model.unlink()
    assert hint("SIGBUS", spec).startswith(f": {model} cannot be read (No such file or directory) while")


def test_inodes_that_change_by_themselves_do_not_count(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.touch()
    stat = os.stat(path)
    assert FileState.of(stat).inode == stat.st_ino
    mounts = f"1 0 {os.major(stat.st_dev)}:{os.minor(stat.st_dev)} / / rw shared:1 - fuse.sshfs host: rw\n"
    monkeypatch.setattr(Path, "read_text", lambda _: mounts)
    config._keeps_inodes.cache_clear()
    try:
        assert FileState.of(stat).inode == 0
    finally:
        config._keeps_inodes.cache_clear()
