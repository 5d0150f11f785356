"""What an engine holds when loading fails: the old model where nothing was begun, and no quiet failure where the ranks
read together."""

import gc
import os
import weakref
from dataclasses import replace

import msgspec
import pytest
import torch
from formats import write
from support import SMALL, inputs, spec_of

from fastusp_backend.comm.mesh import single_rank_mesh
from fastusp_backend.comm.transport import Transport
from fastusp_backend.config import Layout, Settings
from fastusp_backend.engine import Engine
from fastusp_backend.engine import checkpoint as checkpoint_module
from fastusp_backend.engine import engine as engine_module
from fastusp_backend.engine.checkpoint import Checkpoint
from fastusp_backend.engine.room import LEAST_FREE
from fastusp_backend.errors import CheckpointError
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.prompt import Prompt
from fastusp_backend.weights import reading

pytestmark = pytest.mark.unit

MINI = replace(SMALL, hidden=128, heads=1, mlp=256, double_blocks=1, single_blocks=1)


@pytest.fixture
def specs(tmp_path):
    for seed in range(2):
        write_checkpoint(str(tmp_path / f"{seed}.safetensors"), MINI, seed=seed)
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
    assert engine.is_resident(specs[0])


def test_layers_that_gpus_cannot_multiply_in_fp8_are_refused_by_the_header(engine, specs, monkeypatch, tmp_path):
    write_checkpoint(str(tmp_path / "odd.safetensors"), replace(MINI, mlp=264))
    odd = msgspec.structs.replace(spec_of(tmp_path / "odd.safetensors"), linear="fp8", compute="bfloat16")
    assert engine.describe(odd).mlp == 264  # CPU ranks multiply in float32
    monkeypatch.setattr(engine_module, "check_fp8_products", lambda *_: None)
    engine.device = torch.device("cuda")
    with pytest.raises(ValueError, match="linear = exact: fp8 needs layers .* multiples of 16.* 264"):
        engine.describe(odd)
    assert engine.is_resident(specs[0])


def test_another_model_replaces_the_resident_one(engine, specs):
    load(engine, specs[1])
    assert engine.is_resident(specs[1]) and not engine.is_resident(specs[0])
    engine.release()
    assert not engine.is_resident(specs[1])


def test_a_released_models_memory_is_free_at_once(engine):
    """Not when a cycle is collected: the next model has no room beside it."""
    given = inputs(MINI, text=2, size=(4, 4))
    denoiser = engine.denoiser(Layout(ulysses=1, ring=1), Settings())
    denoiser(given.x, given.timestep, [Prompt(given.context, given.y, given.guidance)], lambda: None)
    gc.collect()
    gc.disable()
    try:
        there = [weakref.ref(it) for it in (denoiser, engine._resident.model)]
        del denoiser
        engine.release()
        assert [it() for it in there] == [None, None]
    finally:
        gc.enable()


def test_layouts_that_take_turns_keep_their_buffers(engine, monkeypatch):
    """As of the evaluations of guided steps that also leave out blocks. Of few layouts, and of one kind of options."""
    mesh = single_rank_mesh(engine.device)
    monkeypatch.setattr(engine, "mesh", lambda layout: (mesh, Transport(mesh)))
    one, two, three = (Layout(batch=batch, ulysses=1, ring=1) for batch in (1, 2, 3))
    alone = engine.denoiser(one, Settings())
    assert not engine.shares_memory and not engine.spare
    beside = engine.denoiser(two, Settings())
    assert engine.shares_memory and not engine.spare
    monkeypatch.setattr(engine, "device", torch.device("cuda"))
    assert engine.spare == LEAST_FREE
    monkeypatch.undo()
    monkeypatch.setattr(engine, "mesh", lambda layout: (mesh, Transport(mesh)))
    for _ in range(2):
        assert engine.denoiser(one, Settings()) is alone and engine.denoiser(two, Settings()) is beside
    forgotten = []
    for denoiser in (alone, beside):
        monkeypatch.setattr(denoiser, "forget_prompts", lambda denoiser=denoiser: forgotten.append(denoiser))
    engine.patch({}, {}, base=0, number=1)
    assert forgotten == [alone, beside]
    engine.denoiser(three, Settings())
    assert engine.denoiser(two, Settings()) is beside and engine.denoiser(one, Settings()) is not alone
    engine.denoiser(two, Settings(overlap=False))
    assert not engine.shares_memory
    engine.drop_evaluations()
    assert engine.denoiser(two, Settings()) is not beside


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
        assert not engine.is_resident(specs[1]) and not engine.is_resident(specs[0])


def test_a_file_that_changes_while_ranks_read_together_ends_none(engine, specs, monkeypatch):
    """All have come through their exchanges by then: they can refuse together."""
    engine.describe(specs[1])
    engine.make_room()
    read = engine._described.read

    def meanwhile():
        model = read()
        os.utime(specs[1].path, ns=(0, 1))
        return model

    monkeypatch.setattr(engine, "_reading_group", lambda: "the other ranks")
    monkeypatch.setattr(engine._described, "read", meanwhile)
    with pytest.raises(CheckpointError, match="was changed since it was loaded"):
        engine.load()
    assert not engine.is_resident(specs[1])


@pytest.mark.parametrize(
    "name, changes",
    [
        ("plain", {}),
        ("plain", {"linear": "fp8"}),
        ("plain", {"storage": "bfloat16"}),
        ("plain", {"storage": "float8_e4m3fn", "linear": "fp8"}),
        ("scaled_old", {"storage": "bfloat16", "keep_quantised": True}),
        ("scaled_old", {"storage": "bfloat16"}),
        ("fp8_e5m2", {"storage": "bfloat16", "keep_quantised": True, "linear": "fp8"}),
        ("gguf_Q8_0", {"storage": "bfloat16"}),
    ],
    ids=str,
)
def test_all_weights_have_room_before_the_ranks_read_together(tmp_path, monkeypatch, name, changes):
    """Converted ones too: what does not fit is refused there, where the ranks still agree."""
    plain = path = tmp_path / "plain.safetensors"
    write_checkpoint(str(plain), replace(MINI, hidden=256, heads=2, context=256, pooled=256))
    if name != "plain":
        path = tmp_path / name
        write(name, plain, path)
    spec = msgspec.structs.replace(spec_of(path), **changes)
    model = Checkpoint(spec).read()
    scales = [b for b in model.buffers() if b.dim()]  # the others are four bytes each
    held = sum(t.nbytes for t in [*model.parameters(), *scales])
    taken, limit = [], 1 << 40

    def limited(count, device):
        taken.append(count)
        if sum(taken) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.empty(count, dtype=torch.uint8, device=device)

    monkeypatch.setattr(reading, "empty_bytes", limited)
    monkeypatch.setattr(checkpoint_module, "empty_bytes", limited)
    checkpoint, meta = Checkpoint(spec), torch.device("meta")
    checkpoint.allocate(meta)
    assert sum(taken[:-1]) == held
    largest = max(p.numel() for p in model.parameters())
    converts = name == "scaled_old" and not changes.get("keep_quantised") or name != "scaled_old" and changes
    assert taken[-1] >= 4 * largest if converts else taken[-1] < 8 * largest
    limit = held - 1
    taken.clear()
    with pytest.raises(torch.OutOfMemoryError):
        checkpoint.allocate(meta)
