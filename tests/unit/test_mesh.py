"""Positions and groups are what the naming rule in comm/mesh.py says."""

import itertools

import pytest
import torch

from fastusp_backend.comm import mesh as module
from fastusp_backend.comm.mesh import Mesh, make_mesh, single_rank_mesh
from fastusp_backend.config import Layout

pytestmark = pytest.mark.unit

AXES = ("ulysses", "ring", "sequence", "batch")


def make_all(layout: Layout, monkeypatch) -> list[Mesh]:
    """Every rank's mesh; a process group is the list of its ranks here."""
    monkeypatch.setattr(module.dist, "get_world_size", lambda: layout.ranks)
    monkeypatch.setattr(module.dist, "new_group", lambda members, timeout: members)
    monkeypatch.setattr(module, "close_ports", lambda: None)
    meshes = []
    for rank in range(layout.ranks):
        monkeypatch.setattr(module.dist, "get_rank", lambda rank=rank: rank)
        meshes.append(make_mesh(layout, torch.device("cpu")))
    return meshes


@pytest.mark.parametrize("batch, ring, ulysses", list(itertools.product((1, 2, 3), repeat=3)))
def test_the_naming_rule(batch, ring, ulysses, monkeypatch):
    layout = Layout(ulysses=ulysses, ring=ring, batch=batch)
    meshes = make_all(layout, monkeypatch)
    for rank, mesh in enumerate(meshes):
        assert mesh.sequence_position == mesh.ring_position * ulysses + mesh.ulysses_position
        assert rank == mesh.batch_position * layout.sequence_ranks + mesh.sequence_position
        for axis, size in zip(AXES, (ulysses, ring, ring * ulysses, batch), strict=True):
            group = getattr(mesh, axis)
            if size == 1:
                assert group is None
                continue
            assert [getattr(meshes[member], f"{axis}_position") for member in group] == list(range(size))
            assert group[getattr(mesh, f"{axis}_position")] == rank
            others = {"ulysses_position", "ring_position", "batch_position"} - {f"{axis}_position"}
            if axis == "sequence":
                others = {"batch_position"}
            for other in others:
                assert {getattr(meshes[member], other) for member in group} == {getattr(mesh, other)}


def test_one_rank_has_no_groups():
    mesh = single_rank_mesh(torch.device("cpu"))
    assert [getattr(mesh, axis) for axis in AXES] == [None] * 4
    assert [getattr(mesh, f"{axis}_position") for axis in AXES] == [0] * 4


def test_a_layout_for_another_number_of_ranks(monkeypatch):
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    with pytest.raises(ValueError, match="needs 2 ranks, the pool has 3"):
        make_mesh(Layout(ulysses=2, ring=1), torch.device("cpu"))
