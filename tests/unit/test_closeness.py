"""Which GPUs are taken for ones of the same host, and how the ranks of a sequence send then."""

import pytest
import torch
import torch.distributed as dist

from fastusp_backend.comm import groups, transport
from fastusp_backend.comm.mesh import Mesh
from fastusp_backend.config import Layout

pytestmark = pytest.mark.unit

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("per_machine, hosts, closeness", [("2", "aa", 2), ("1", "aa", 0), ("2", "ab", 0)])
def test_machines_of_one_name_are_several(monkeypatch, per_machine, hosts, closeness):
    """Cloned images have one; and device 0 of each is no device that the other reaches."""
    rows = []

    def gather(out, mine, group):
        rows.append(mine)
        out.copy_(torch.cat([rows[0], rows[-1]]))

    monkeypatch.setenv("LOCAL_WORLD_SIZE", per_machine)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(transport.signals, "AVAILABLE", True)
    monkeypatch.setattr(transport, "all_gather_single", gather)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    for rank, host in enumerate(hosts):
        monkeypatch.setattr(groups, "world", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(transport.socket, "gethostname", lambda host=host: host)
        found = transport._closeness(None)
    assert found == closeness


BOTH = "symmetric memory, nccl between machines", "host memory, nccl between machines"


@pytest.mark.parametrize(
    "layout, all_of_them, own, others, kind",
    [
        ((2, 2), 2, 2, 2, "symmetric memory"),
        ((2, 2), 1, 2, 2, "host memory"),
        ((2, 2), 0, 2, 2, BOTH[0]),
        ((2, 2), 0, 2, 1, BOTH[1]),
        ((2, 2), 0, 1, 2, BOTH[1]),
        ((2, 2), 0, 2, 0, "nccl"),
        ((2, 2), 0, 0, 2, "nccl"),
        ((1, 4), 0, None, None, "nccl"),
        ((4, 1), 0, 0, 0, "nccl"),
    ],
)
def test_ranks_of_several_machines_choose_alike(monkeypatch, layout, all_of_them, own, others, kind):
    """closeness: of all ranks of the sequence, of this one's Ulysses group, and the least of the other groups'."""
    ulysses, ring = layout
    made = {"sequence": object(), "ulysses": object() if ulysses > 1 else None, "ring": object() if ring > 1 else None}
    mesh = Mesh(layout=Layout(ulysses=ulysses, ring=ring), device=CUDA, **made)
    asked = []

    def least(value, op, group):
        assert op == dist.ReduceOp.MIN and group is mesh.sequence
        value.clamp_(max=others)

    monkeypatch.setattr(
        transport, "_closeness", lambda group: (asked.append(group), all_of_them if group is mesh.sequence else own)[1]
    )
    monkeypatch.setattr(dist, "all_reduce", least)
    assert transport._choose(mesh) == kind
    both = all_of_them == 0 and ulysses > 1 and ring > 1
    assert asked == [mesh.sequence] + [mesh.ulysses] * both


def test_the_slower_link_is_measured(monkeypatch):
    """The ring's between machines; the arena is that of Ulysses."""
    made, measured = [], []
    monkeypatch.setitem(transport._ARENAS, "host memory", lambda group, device: made.append(group))
    monkeypatch.setattr(transport, "measure_link_speed", lambda mesh, *how: measured.append(how) or 1.2)
    monkeypatch.setattr(transport, "allocate_together", lambda allocate, group: allocate())
    groups_of = {"sequence": object(), "ulysses": object(), "ring": object()}
    mesh = Mesh(layout=Layout(ulysses=2, ring=2), device=CUDA, **groups_of)
    between = transport.Transport(mesh, BOTH[1])
    assert between.wire("auto") == "int8"
    assert str(between) == "host memory, nccl between machines (1.20 GB/s), int8 wire"
    assert made == [mesh.ulysses] and measured == [(mesh.ring,)]
    one = transport.Transport(mesh, "host memory")
    one.wire("auto")
    assert made[1:] == [mesh.sequence] * 2 and measured[1:] == [(mesh.sequence, transport._ARENAS["host memory"])]
