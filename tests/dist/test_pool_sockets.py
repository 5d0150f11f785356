"""A pool is reached through its private directory alone: what it opens besides takes nobody, and runs nothing."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pools import evaluate, pids, run_dir

pytestmark = pytest.mark.dist

ATTACKER = Path(__file__).with_name("attacker.py")
NOBODY = 65534


@dataclass(frozen=True)
class Listener:
    """name: an address and port, or a path; an abstract one begins with @."""

    process: int
    kind: str
    name: str
    port: int = 0


def listeners(process: int) -> list[Listener]:
    """All sockets of a process that others can reach: TCP that listens, UDP and Unix that have an address."""
    inodes = set()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        target = os.readlink(entry)
        if target.startswith("socket:"):
            inodes.add(target[len("socket:[") : -1])
    found = []
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        for fields in rows(process, kind):
            if fields[9] in inodes and (fields[3] == "0A" or kind.startswith("udp")):
                host, port = fields[1].split(":")
                found.append(Listener(process, kind, address(host), int(port, 16)))
    return found + [
        Listener(process, "unix", fields[7]) for fields in rows(process, "unix") if fields[6] in inodes and fields[7:]
    ]


def rows(process: int, kind: str) -> list[list[str]]:
    path = Path(f"/proc/{process}/net/{kind}")
    return [line.split() for line in path.read_text().splitlines()[1:]] if path.exists() else []


def address(text: str) -> str:
    """As the kernel prints it: words of 32 bits in the machine's own order."""
    words = [int(text[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(text), 8)]
    return socket.inet_ntop(socket.AF_INET6 if len(words) > 1 else socket.AF_INET, b"".join(words))


def processes(pool) -> list[int]:
    return [pool._workers._process.pid, *pids(pool)]


def descriptors(pool) -> int:
    return sum(len(os.listdir(f"/proc/{process}/fd")) for process in processes(pool))


@pytest.fixture
def pool(shared_pool, dev):
    pool = shared_pool(2)
    evaluate(pool, dev)
    return pool


def test_nothing_listens_beyond_loopback_and_the_private_directory(pool):
    directory = run_dir(pool)
    torchrun, *ranks = processes(pool)
    assert listeners(torchrun) == []
    everything = [listener for rank in ranks for listener in listeners(rank)]
    local = [x for x in everything if x.kind == "unix"]
    assert {x.name for x in local} == {str(directory / "control.sock")}
    assert directory.stat().st_mode & 0o777 == 0o700
    net = [x for x in everything if x.kind != "unix"]
    assert {x.process for x in net} == set(ranks)  # gloo's, so that the test sees what is there
    assert {x.name for x in net} <= {"127.0.0.1", "::1"}, net


@pytest.mark.parametrize("user", [os.getuid(), NOBODY], ids=["the same user", "another user"])
def test_whoever_connects_gets_nowhere(pool, dev, tmp_path, user):
    if user != os.getuid() and os.getuid() != 0:
        pytest.skip("only root can try it as another user")
    before, expected, marker = processes(pool), evaluate(pool, dev), tmp_path / "marker"
    ports = sorted({x.port for process in before for x in listeners(process) if x.port})
    held = descriptors(pool)
    command = [sys.executable, str(ATTACKER), str(user), run_dir(pool).name, str(marker), *map(str, ports)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as attacker:
        achieved = json.loads(attacker.stdout.readline())
        assert not marker.exists() and achieved["stores"] == []
        assert descriptors(pool) <= held + 10
        assert torch.equal(evaluate(pool, dev), expected)
        attacker.stdin.close()
    assert processes(pool) == before
