"""A measurement of the link that runs out of memory does so on all ranks."""

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fastusp_backend.comm.groups import OutOfMemoryTogether
from fastusp_backend.comm.link_speed import PROBE_BYTES
from fastusp_backend.comm.mesh import Mesh
from fastusp_backend.comm.transport import Transport
from fastusp_backend.config import Layout

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


@pytest.mark.parametrize("short", [None, 0, 1])
def test_a_probe_without_memory_fails_on_all_ranks_alike(short, monkeypatch):
    """None of them goes on into an exchange that the other never joins."""
    make, store = torch.empty, dist.HashStore()

    def empty(*shape, **kwargs):
        if threading.current_thread().name == f"rank {short}" and shape == (PROBE_BYTES,):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 MiB")
        return make(*shape, **kwargs)

    def measure(rank):
        group = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=20))
        groups[threading.current_thread()] = group
        mesh = Mesh(layout=Layout(ulysses=2, ring=1), device=CPU, sequence_position=rank, sequence=group)
        try:
            Transport(mesh, "nccl").wire("auto")
        except Exception as error:
            ends[rank] = error

    def begin(group):
        raise NotImplementedError

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr("fastusp_backend.comm.link_speed.all_ranks", lambda: groups[threading.current_thread()])
    monkeypatch.setattr("fastusp_backend.comm.link_speed.GroupExchange", begin)  # past the agreement
    ends: dict[int, Exception] = {}
    groups: dict[threading.Thread, dist.ProcessGroup] = {}
    threads = [threading.Thread(target=measure, args=(rank,), name=f"rank {rank}") for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    expected = NotImplementedError if short is None else OutOfMemoryTogether
    assert [type(ends[rank]) for rank in range(2)] == [expected] * 2
    if short is not None:
        assert "32.00 MiB" in str(ends[short]) and "on rank" in str(ends[1 - short])
