"""A pool is reached through its private directory alone: what it opens besides takes nobody, and runs nothing."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from listening import listeners
from pools import evaluate, pids, run_dir

pytestmark = pytest.mark.dist

ATTACKER = Path(__file__).with_name("attacker.py")
NOBODY = 65534


def processes(pool) -> list[int]:
    return [pool._workers.processes.torchrun.pid, *pids(pool)]


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


def test_whoever_connects_gets_nowhere(pool, dev, tmp_path):
    """The same user and, where root can try it, another one beside it."""
    users = {os.getuid(), NOBODY} if os.getuid() == 0 else {os.getuid()}
    before, expected = processes(pool), evaluate(pool, dev)
    ports = sorted({x.port for process in before for x in listeners(process) if x.port})
    held = descriptors(pool)
    with contextlib.ExitStack() as attacks:
        attackers = []
        for user in users:
            marker = tmp_path / f"marker {user}"
            command = [sys.executable, str(ATTACKER), str(user), run_dir(pool).name, str(marker), *map(str, ports)]
            attacker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            attackers.append(attacks.enter_context(attacker))
        achieved = [json.loads(attacker.stdout.readline()) for attacker in attackers]
        assert not any(tmp_path.iterdir()) and all(each["stores"] == [] for each in achieved)
        assert descriptors(pool) <= held + 10
        assert torch.equal(evaluate(pool, dev), expected)
    assert processes(pool) == before
