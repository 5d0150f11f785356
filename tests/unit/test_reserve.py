"""Batch groups' memory grows alike, whatever prompts each evaluates."""

from types import SimpleNamespace

import pytest
import torch
from support import SMALL, inputs

from fastusp_backend.comm import transport
from fastusp_backend.comm.mesh import Mesh
from fastusp_backend.comm.shards import SequenceShards
from fastusp_backend.config import Layout, Settings
from fastusp_backend.engine.denoiser import Denoiser
from fastusp_backend.prompt import Prompt

pytestmark = pytest.mark.unit

LAYOUT = Layout(batch=2, ulysses=2, ring=2)


class Arena:
    """Notes each time that it grows."""

    hops = 1

    def __init__(self, group, device):
        self.size, self.position, self.generation = LAYOUT.sequence_ranks, 0, 0
        self.grown = []

    def reserve(self, capacity):
        if capacity > max(self.grown, default=0):
            self.grown.append(capacity)

    def addresses(self, shape, dtype, offset):
        return None  # no kernel writes there

    def own(self, shape, dtype, offset):
        return torch.empty(shape, dtype=dtype)


@pytest.fixture
def connected(monkeypatch):
    monkeypatch.setitem(transport._ARENAS, "symmetric memory", Arena)
    groups = {name: object() for name in ("batch", "sequence", "ulysses", "ring")}
    return transport.Transport(Mesh(layout=LAYOUT, device=torch.device("cpu"), **groups), "symmetric memory")


@pytest.mark.parametrize("packed", [None, torch.int8])
def test_what_is_no_longer_needs_no_more(connected, packed):
    of_model = {"heads": 4, "dim": 8, "dtype": torch.bfloat16, "packed": packed, "width": 16}
    connected.reserve(SequenceShards(LAYOUT, 35, 64), 1, **of_model)
    grown = [list(arena.grown) for arena in connected._arenas]
    assert [len(of) for of in grown] == [1, 1]
    for text, image in ((35, 64), (6, 64), (34, 61)):
        connected.connect(SequenceShards(LAYOUT, text, image), 1, **of_model)
    assert [arena.grown for arena in connected._arenas] == grown
    connected.connect(SequenceShards(LAYOUT, 40, 64), 1, **of_model)
    assert len(connected._arenas[0].grown) == 2 and len(connected._arenas[1].grown) == 1


@pytest.mark.parametrize("lengths", [(35, 6), (6, 35)])
def test_both_groups_make_room_for_the_longer_prompt(monkeypatch, lengths):
    given = [inputs(SMALL, text=length, size=(6, 4)) for length in lengths]
    prompts = [Prompt(of.context, of.y, of.guidance) for of in given]
    asked = []

    class Stop(Exception):
        pass

    def reserve(shards, batch, **of_model):
        asked.append((shards, batch, of_model))
        raise Stop

    room = SimpleNamespace(reserve=reserve, wire=lambda choice: "int8", generation=0)
    for position in range(2):
        mesh = Mesh(layout=LAYOUT, device=torch.device("cpu"), batch_position=position)
        denoiser = Denoiser(SMALL.build(), mesh, room, Settings(), torch.float32)
        with pytest.raises(Stop):
            denoiser(given[0].x, given[0].timestep, prompts, lambda: None)
    first, second = asked
    assert first == second and first[0] == SequenceShards(LAYOUT, 35, 6) and first[1] == len(given[0].x)
    assert first[2]["packed"] == torch.int8 and first[2]["heads"] == SMALL.heads
