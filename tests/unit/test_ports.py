"""gloo's ports take nobody once the ranks are connected, and nobody's else stay in between."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fastusp_backend import ports
from fastusp_backend.ports import close_ports

pytestmark = pytest.mark.unit

NOBODY = 65534


def groups(ranks: int) -> list[dist.ProcessGroupGloo]:
    """One of so many ranks, which are threads here."""
    store = dist.HashStore()
    with ThreadPoolExecutor(ranks) as threads:
        made = threads.map(lambda rank: dist.ProcessGroupGloo(store, rank, ranks, timedelta(seconds=20)), range(ranks))
        return list(made)


@pytest.fixture(autouse=True)
def loopback(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def addresses() -> list[tuple[str, int]]:
    found = []
    for listener in ports._gloo_listeners():
        with listener:
            found.append(listener.getsockname())
    return found


def reached(address: tuple[str, int]) -> bool:
    with socket.socket() as connection:
        connection.settimeout(0.2)
        return connection.connect_ex(address) == 0


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_closed_ports_take_nobody_and_groups_work_on():
    with socket.create_server(("127.0.0.1", 0)) as other:
        before = addresses()
        made = groups(2)
        opened = [address for address in addresses() if address not in before]
        assert len(opened) == 2 and all(host == "127.0.0.1" for host, _ in opened)
        held = descriptors()
        close_ports()
        assert not any(reached(address) for address in opened)
        assert descriptors() <= held
        assert reached(other.getsockname())

        tensors = [torch.full((4,), rank + 1.0) for rank in range(2)]
        for work in [group.allreduce([tensor]) for group, tensor in zip(made, tensors, strict=True)]:
            work.wait()
        assert all(torch.equal(tensor, torch.full((4,), 3.0)) for tensor in tensors)
        assert len(groups(2)) == 2  # later ones have ports of their own
        close_ports()


CONNECT = """
import os, socket, sys
os.setgroups([]); os.setgid({user}); os.setuid({user})
stranger = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
stranger.connect((sys.argv[1], int(sys.argv[2])))
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can connect as another user")
@pytest.mark.parametrize("host", ["127.0.0.1", "::ffff:127.0.0.1"])
def test_a_group_that_another_user_has_connected_to_is_not_used(host):
    before = addresses()
    made = groups(1)
    (port,) = [address[1] for address in addresses() if address not in before]
    command = [sys.executable, "-c", CONNECT.format(user=NOBODY), host, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as stranger:
        stranger.stdout.readline()
        with pytest.raises(PermissionError, match=f"user {NOBODY} connected to a port"):
            close_ports()
        stranger.stdin.close()
    assert made


def test_a_kernel_that_closes_no_ports_is_told_of(monkeypatch, caplog):
    before = addresses()
    made = groups(1)
    monkeypatch.setattr(ports, "_FILTER", b"")
    close_ports()
    (opened,) = [address for address in addresses() if address not in before]
    assert f"port {opened[1]} stays open to all users of this machine" in caplog.text
    assert made and reached(opened)
