"""Which GPUs are taken for ones of the same host."""

import pytest
import torch
import torch.distributed as dist

from fastusp_backend.comm import groups, transport

pytestmark = pytest.mark.unit


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
