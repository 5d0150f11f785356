"""Model files that change under a running pool: what is computed is by one state of one file, or is refused."""

import os
import shutil

import pytest
import torch
from pools import GIVEN, LONG, PROMPT, evaluate, pids, sample, session
from support import REORDERED, SMALL, relative_difference

from fastusp_backend.errors import PoolError, RequestError
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import Progress

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def pool(mortal):
    return mortal


@pytest.fixture
def model(dev, tmp_path):
    path = tmp_path / "model.safetensors"
    shutil.copy(dev, path)
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """As dev, with other weights."""
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    write_checkpoint(str(path), SMALL, seed=5)
    return path


def overwrite(path, source) -> None:
    """In place; at another time, though the system's clock may stand for some milliseconds."""
    stat = os.stat(path)
    with open(path, "r+b") as file:
        file.write(source.read_bytes())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def again(old) -> torch.Tensor:
    return old.evaluate(GIVEN.x, GIVEN.timestep, PROMPT, Progress())


def test_a_file_that_is_overwritten_between_prompts(pool, dev, model, other):
    old, first = session(pool, model), evaluate(pool, model)
    before, theirs = pids(pool), evaluate(pool, other)
    again(old)
    overwrite(model, other)
    with pytest.raises(RequestError, match=f"writes to {model}, then queue .* it was changed since it was loaded"):
        again(old)
    assert relative_difference(evaluate(pool, model), theirs) < REORDERED < relative_difference(first, theirs)
    with pytest.raises(RequestError, match="was changed since this workflow loaded it"):
        again(old)
    assert pids(pool) == before


def test_a_file_that_is_replaced_or_removed_between_prompts(pool, model, other, tmp_path):
    """Who asks for the old one has it, as long as nobody asks for the new one."""
    old, first = session(pool, model), evaluate(pool, model)
    shutil.copy(other, tmp_path / "download")
    (tmp_path / "download").rename(model)
    assert torch.equal(again(old), first)
    new = session(pool, model)
    model.unlink()
    assert torch.equal(again(old), first)
    with pytest.raises(RequestError, match=f"there is no model file {model}"):
        again(new)


def test_a_file_that_is_overwritten_while_a_prompt_runs(pool, model, other):
    """Half of it would be computed by other weights."""
    want, before = sample(pool, other), pids(pool)

    def step(event, tensors):
        if event.index == 1:
            overwrite(model, other)

    with pytest.raises(RequestError, match="was changed since it was loaded"):
        sample(pool, model, torch.linspace(1, 0, 101), Progress(step=step))
    assert relative_difference(sample(pool, model), want) < 1e-3
    assert pids(pool) == before


def test_a_file_that_is_cut_short_between_prompts(pool, dev, model):
    old, want, size = session(pool, model), evaluate(pool, model), model.stat().st_size
    before = pids(pool)
    os.truncate(model, 1000)
    with pytest.raises(RequestError, match=f"was cut short, from {size} to 1000 bytes, since it was loaded"):
        again(old)
    with pytest.raises(RequestError, match="is truncated|truncated, corrupt"):
        evaluate(pool, model)
    assert pids(pool) == before
    shutil.copy(dev, model)
    assert relative_difference(evaluate(pool, model), want) < REORDERED


def test_a_file_that_is_cut_short_while_a_prompt_runs(pool, dev, model):
    size, want = model.stat().st_size, evaluate(pool, dev)

    def step(event, tensors):
        if event.index == 1:
            os.truncate(model, 1000)

    with pytest.raises(PoolError, match=r"was ended by SIGBUS: ") as failure:
        sample(pool, model, LONG, Progress(step=step))
    assert f"{model} was cut short, from {size} to 1000 bytes, while it was in use" in str(failure.value)
    assert relative_difference(evaluate(pool, dev), want) < REORDERED
