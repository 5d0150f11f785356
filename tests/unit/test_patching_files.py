"""Patches are undone by reading the file again: whatever has become of it."""

import os
import shutil

import pytest
import torch
from patched import MINI, NONE, PATCHES, QKV, TENSORS, changed, everything, in_memory, loaded
from support import spec_of

from fastusp_backend.config import WeightPatch
from fastusp_backend.engine.checkpoint import Checkpoint
from fastusp_backend.engine.patching import PatchedWeights
from fastusp_backend.errors import CheckpointError
from fastusp_backend.models.synthetic import write_checkpoint

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    path = tmp_path_factory.mktemp("patching") / "mini.safetensors"
    write_checkpoint(str(path), MINI, seed=1)
    return path


@pytest.mark.parametrize("how", ["replaced", "removed", "linked"])
def test_a_file_that_is_gone_still_restores_its_weights(mini, tmp_path, how):
    """It is open."""
    path, other = tmp_path / "model", tmp_path / "other"
    shutil.copy(mini, other)
    if how == "linked":
        path.symlink_to(other)
    else:
        shutil.copy(mini, path)
    checkpoint = loaded(path)
    weights, before = PatchedWeights(checkpoint), everything(checkpoint)
    weights.change(PATCHES, TENSORS, base=0, number=1)
    path.unlink()
    if how != "removed":
        write_checkpoint(str(path), MINI, seed=5)
    weights.change(NONE, {}, base=1, number=0)
    assert not changed(before, everything(checkpoint))


@pytest.fixture
def copied(mini, tmp_path):
    """(path, a checkpoint of it, its weights, patched)."""
    path = tmp_path / "model"
    shutil.copy(mini, path)
    checkpoint = loaded(path)
    weights = PatchedWeights(checkpoint)
    weights.change(PATCHES, TENSORS, base=0, number=1)
    return path, checkpoint, weights


def write_to(path) -> None:
    stat = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(bytes(4))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


@pytest.mark.parametrize("how", ["written to", "cut"])
def test_a_file_that_was_written_to_is_refused_before_anything_changes(copied, how):
    path, checkpoint, weights = copied
    after, size, words = in_memory(checkpoint, f"{QKV}.weight").data.clone(), path.stat().st_size, "was changed"
    if how == "cut":
        os.truncate(path, size - 1)
        words = f"was cut short, from {size} to {size - 1} bytes,"
    else:
        write_to(path)
    with pytest.raises(
        CheckpointError,
        match=f"^Wait until nothing writes to {path}, then queue the prompt again: it {words} since it was loaded",
    ):
        weights.change(NONE, {}, base=1, number=0)
    assert weights.number == 1 and torch.equal(in_memory(checkpoint, f"{QKV}.weight").data, after)


def test_a_file_that_is_written_to_while_it_is_read_again(copied, monkeypatch):
    path, checkpoint, weights = copied
    reread = checkpoint.reread

    def meanwhile(names):
        yield from reread(names)
        write_to(path)

    monkeypatch.setattr(checkpoint, "reread", meanwhile)
    with pytest.raises(CheckpointError, match="was changed since it was loaded"):
        weights.change(NONE, {}, base=1, number=0)
    assert weights.number is None


def test_ranks_refuse_a_file_that_was_written_to_together(mini, tmp_path):
    """Also one that holds none of the weights that are read again, or it would have another patch set than the rest."""
    path = tmp_path / "model"
    shutil.copy(mini, path)
    name = "double_blocks.0.img_mod.lin.bias"
    checkpoints = [Checkpoint(spec_of(path), rank, 2) for rank in range(2)]
    for checkpoint in checkpoints:
        checkpoint.read()
    weights = [PatchedWeights(checkpoint) for checkpoint in checkpoints]
    patches = {name: (WeightPatch(kind="set", tensors={"value": "value"}, strength=1.0),)}
    for each in weights:
        each.change(patches, {"value": torch.zeros(6 * MINI.hidden)}, base=0, number=1)
    assert {checkpoint.is_local(checkpoint.model.module_key(name)) for checkpoint in checkpoints} == {True, False}
    write_to(path)
    for each in weights:
        with pytest.raises(CheckpointError, match="was changed"):
            each.change({name: ()}, {}, base=1, number=2)
        assert each.number == 1
