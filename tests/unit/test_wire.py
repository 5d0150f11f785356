"""What ranks send, by the option and by the link."""

import pytest
import torch

from fastusp_backend.comm.mesh import Mesh, single_rank_mesh
from fastusp_backend.comm.transport import Transport
from fastusp_backend.config import Layout

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


@pytest.mark.parametrize("speed, wire", [(390.0, "exact"), (100.0, "exact"), (55.0, "int8"), (12.0, "int8")])
def test_the_wire_follows_the_link(speed, wire, monkeypatch):
    transport = Transport(single_rank_mesh(CPU), "nccl")
    monkeypatch.setattr("fastusp_backend.comm.transport.measure_link_speed", lambda *_: speed)
    assert transport.wire("exact") == "exact" and transport.wire("fp8") == "fp8"
    assert str(transport) == "nccl, fp8 wire"
    assert transport.wire("auto") == wire
    assert str(transport) == f"nccl ({speed:.0f} GB/s), {wire} wire"


def test_one_rank_alone_names_no_wire():
    transport = Transport(single_rank_mesh(CPU))
    assert transport.wire("auto") == "exact" and transport.wire("fp8") == "fp8" and str(transport) == "none"


def test_cpu_ranks_share_their_memory():
    mesh = Mesh(layout=Layout(ulysses=2, ring=1), device=CPU, sequence=object())
    assert Transport(mesh, "gloo").wire("auto") == "exact"
