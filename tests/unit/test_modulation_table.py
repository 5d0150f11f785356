"""Modulations of a prompt's timesteps on one rank: what is computed, once, and what is cached of it."""

import weakref
from collections import Counter

import pytest
import torch
from support import inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastusp_backend.engine import modulations
from fastusp_backend.engine.modulations import ModulationTable
from fastusp_backend.models.synthetic import TINY_CHROMA, TINY_FLUX, random_state
from fastusp_backend.prompt import Prompt

pytestmark = pytest.mark.unit

ALL, NONE = slice(None), slice(0, 0)


def prompt_of(seed: int = 0, batch: int = 3) -> Prompt:
    given = inputs(TINY_FLUX, text=2, size=(2, 2), batch=batch, seed=seed)
    return Prompt(given.context, given.y, given.guidance)


@pytest.fixture(scope="module")
def model():
    built = TINY_FLUX.build()
    built.load_state_dict(random_state(built, seed=0, dtype=torch.float32), assign=True)
    return built


@pytest.fixture
def table(model):
    return ModulationTable(model, torch.float32, None)


@pytest.fixture
def gathers(table, monkeypatch):
    """How many rows each gather brings."""
    counts, gather = [], table._gather
    monkeypatch.setattr(table, "_gather", lambda active: (counts.append(len(active)), gather(active))[1])
    return counts


@torch.inference_mode()
def expected(model, prompt: Prompt, timesteps: tuple[float, ...]) -> torch.Tensor:
    active = model.modulation_input(torch.tensor([timesteps]), prompt, torch.float32)[0]
    return torch.cat([layer(active) for layer in model.modulations()], dim=-1)


@pytest.mark.parametrize("at_once", [1, 4, 64])
def test_rows_are_those_of_the_layers_however_many_are_computed_at_once(model, table, monkeypatch, at_once):
    monkeypatch.setattr(modulations, "ROWS_AT_ONCE", at_once)
    prompts, timesteps = [prompt_of(0), prompt_of(9)], (0.9, 0.5, 0.1)
    for shares in ([ALL, ALL], [ALL, NONE], [slice(1, 2), slice(2, 3)]):
        table.forget()
        rows = table.rows(timesteps, prompts, shares)
        for prompt, images, of in zip(prompts, shares, rows, strict=True):
            assert len(of) == 1
            torch.testing.assert_close(of[0], expected(model, prompt, timesteps)[images], rtol=1e-5, atol=1e-6)


def test_what_was_prepared_is_computed_once(table, gathers):
    prompts = [prompt_of(0, batch=1), prompt_of(9, batch=1)]
    table.prepare([0.9, 0.6, 0.9, 0.3], prompts, [ALL, ALL])
    assert gathers == [6]
    for t in (0.3, 0.9, 0.6):
        table.rows((t,), prompts, [ALL, ALL])
    assert gathers == [6]
    table.rows((0.1,), prompts, [ALL, ALL])
    table.forget()
    table.rows((0.1,), prompts, [ALL, ALL])
    assert gathers == [6, 2, 2]


def test_the_row_that_was_used_longest_ago_makes_room(table, gathers, monkeypatch):
    monkeypatch.setattr(modulations, "CACHED_ROWS", 3)
    prompt = prompt_of(batch=1)
    table.prepare([0.9, 0.8, 0.7, 0.6], [prompt], [ALL])
    assert gathers == [3]
    for t in (0.9, 0.6):
        table.rows((t,), [prompt], [ALL])
    assert list(table._rows[prompt]) == [(0.7,), (0.9,), (0.6,)] and gathers == [3, 1]


class Peak(TorchDispatchMode):
    """How many bytes of tensors that were made inside were there at a time."""

    def __init__(self):
        super().__init__()
        self.there, self.most = 0, 0
        self.users: Counter[int] = Counter()  # of each storage, by its address

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {place_of(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if (place := place_of(tensor)) in self.users or place not in given:
                size = tensor.untyped_storage().nbytes()
                self.there += 0 if self.users[place] else size
                self.most = max(self.most, self.there)
                self.users[place] += 1
                weakref.finalize(tensor, self.left, place, size)
        return out

    def left(self, place: int, size: int) -> None:
        self.users[place] -= 1
        if not self.users[place]:
            del self.users[place]
            self.there -= size


def place_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_chromas_rows_take_no_more_memory_than_was_tried(monkeypatch):
    """Beside what one evaluation takes within the network: its rows lie in one piece as they are computed."""
    model, sizes = TINY_CHROMA.build(), []
    model.load_state_dict(random_state(model, seed=0, dtype=torch.float32), assign=True)
    table, count = ModulationTable(model, torch.float32, None), 48
    prompt = Prompt(torch.zeros(1, 2, TINY_CHROMA.context))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **more: (sizes.append(size), empty(0, **more))[1])
    table.probe_memory(count, [prompt], [ALL])
    monkeypatch.undo()
    with torch.inference_mode():
        active = model.modulation_input(torch.rand(count, 1), prompt, torch.float32)[:, 0]
        with Peak() as peak:
            table._gather(active)
    within = 8 * model.distilled_guidance_layer.vectors * TINY_CHROMA.approximator
    assert 0.9 * sizes[1] < peak.most / 4 < sizes[1] + within
