"""What an engine holds when loading fails: the old model where nothing was begun, and no quiet failure where the ranks
read together."""

from dataclasses import replace

import pytest
import torch
from support import SMALL, spec_of

from fastusp_backend.engine import Engine
from fastusp_backend.errors import CheckpointError
from fastusp_backend.models.synthetic import write_flux

pytestmark = pytest.mark.unit

MINI = replace(SMALL, hidden=128, heads=1, mlp=256, double_blocks=1, single_blocks=1)


@pytest.fixture
def specs(tmp_path):
    for seed in range(2):
        write_flux(str(tmp_path / f"{seed}.safetensors"), MINI, seed=seed)
    return [spec_of(tmp_path / f"{seed}.safetensors") for seed in range(2)]


@pytest.fixture
def engine(specs):
    engine = Engine(torch.device("cpu"))
    load(engine, specs[0])
    return engine


def load(engine, spec) -> None:
    assert engine.describe(spec).heads == 1
    engine.make_room()
    engine.load()


def test_a_file_refused_by_its_header_leaves_the_resident_model(engine, specs):
    with open(specs[1].path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError):
        engine.describe(specs[1])
    with pytest.raises(CheckpointError):
        engine.describe(spec_of(specs[1].path))
    assert engine.holds(specs[0])


def test_another_model_replaces_the_resident_one(engine, specs):
    load(engine, specs[1])
    assert engine.holds(specs[1]) and not engine.holds(specs[0])
    engine.release()
    assert not engine.holds(specs[1])


def test_a_failure_while_ranks_read_together_ends_the_rank(engine, specs, monkeypatch):
    """It must not be taken for one that can be refused, as CheckpointError and OutOfMemoryError are."""
    for error in (CheckpointError("the file ends"), torch.OutOfMemoryError("CUDA out of memory")):
        monkeypatch.undo()
        engine.describe(specs[1])
        engine.make_room()

        def fail(error=error):
            raise error

        monkeypatch.setattr(engine, "_reading_group", lambda: "the other ranks")
        monkeypatch.setattr(engine._described, "read", fail)
        with pytest.raises(RuntimeError, match=f"when the ranks had begun: {error}") as fatal:
            engine.load()
        assert type(fatal.value) is RuntimeError
        assert not engine.holds(specs[1]) and not engine.holds(specs[0])
