"""Machines for tests: network namespaces of this host, joined by a bridge, on which each has an address of its own; and
a server on all of them."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from serving import Serving

from fastusp_backend.keyfile import Key
from fastusp_backend.pool import Pool

PREFIX = f"fu{os.getpid()}"
"""Of all names, which have 15 characters at most: other tests may run on this host."""
NETWORK = f"10.213.{os.getpid() % 256}"
BRIDGE = f"{PREFIX}-br"
HOST = f"{NETWORK}.254"
PORTS = itertools.count(8189)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def name(number: int) -> str:
    return f"{PREFIX}-{number}"


def address(number: int) -> str:
    return f"{NETWORK}.{number + 1}"


def inside(number: int) -> tuple[str, ...]:
    """What a command begins with that runs on a machine."""
    return ("ip", "netns", "exec", name(number))


def cut(number: int) -> None:
    """No packet reaches the machine, or leaves it."""
    run("ip", "link", "set", f"{name(number)}-br", "down")


def join(number: int) -> None:
    run("ip", "link", "set", f"{name(number)}-br", "up")


@contextlib.contextmanager
def host_cut_off() -> Iterator[None]:
    """No packet of this host reaches a machine; those of the machines reach each other."""
    run("ip", "addr", "del", f"{HOST}/24", "dev", BRIDGE)
    run("ip", "route", "add", "blackhole", f"{NETWORK}.0/24")
    try:
        yield
    finally:
        run("ip", "route", "del", "blackhole", f"{NETWORK}.0/24")
        run("ip", "addr", "add", f"{HOST}/24", "dev", BRIDGE)


@contextlib.contextmanager
def shaped(number: int, *how: str) -> Iterator[None]:
    """What the machine sends goes through one of the system's queues, as `tc` calls it. Raises OSError where the system
    has none such."""
    where = ("dev", f"{name(number)}-in", "root")
    run(*inside(number), "tc", "qdisc", "add", *where, *how)
    try:
        yield
    finally:
        run(*inside(number), "tc", "qdisc", "del", *where)


class Cluster:
    """`serve` on each of the machines from 0 on, with so many CPU ranks each, and folders of their own for a model."""

    def __init__(self, folder: Path, count: int, ranks: int, model: Path):
        self.folder, self.port = folder, next(PORTS)
        self._count, self._ranks = count, ranks
        Key.read_or_make(folder / "key")  # for all to start at once
        for number in range(count):
            (folder / f"models-{number}").mkdir()
            shutil.copy(model, folder / f"models-{number}" / model.name)
        self.servers = [self._start(number) for number in range(count)]

    def _start(self, number: int) -> Serving:
        arguments = ["--gpus", f"cpu:{self._ranks}", "--nnodes", str(self._count), "--node-rank", str(number)]
        arguments += ["--rdzv-endpoint", f"{address(0)}:{self.port}", "--trust-network"]
        arguments += ["--models", str(self.folder / f"models-{number}")]
        return Serving(self.folder, *arguments, listen=None, prefix=inside(number))

    def start_again(self, number: int) -> None:
        self.servers[number] = self._start(number)
        self.servers[number].says("joined")

    def attach(self) -> Pool:
        for server in self.servers[1:]:
            server.says("joined")
        return self.servers[0].attach()

    def sigterm_ends_all(self, number: int, ranks: list[int], seconds: float) -> None:
        """Ends `serve` on one machine, as an administrator does. The others and the ranks end in so many seconds."""
        began = time.monotonic()
        self.servers[number].process.send_signal(signal.SIGTERM)
        assert [server.process.wait(seconds) for server in self.servers] == [0] * len(self.servers)
        assert time.monotonic() - began < seconds and not any(os.path.exists(f"/proc/{rank}") for rank in ranks)

    def close(self) -> None:
        for server in reversed(self.servers):
            server.close()


@contextlib.contextmanager
def cluster(*arguments) -> Iterator[Cluster]:
    made = Cluster(*arguments)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def network(machines: int) -> Iterator[None]:
    """So many machines, from 0 on, and this host among them as `HOST`. Raises OSError where they are not allowed."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise OSError("they need root and `ip`")
    try:
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "addr", "add", f"{HOST}/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        for number in range(machines):
            space, here, there = name(number), f"{name(number)}-br", f"{name(number)}-in"
            run("ip", "netns", "add", space)
            run("ip", "link", "add", here, "type", "veth", "peer", "name", there)
            run("ip", "link", "set", there, "netns", space)
            run("ip", "link", "set", here, "master", BRIDGE)
            run("ip", "link", "set", here, "up")
            run(*inside(number), "ip", "addr", "add", f"{address(number)}/24", "dev", there)
            run(*inside(number), "ip", "link", "set", there, "up")
            run(*inside(number), "ip", "link", "set", "lo", "up")
        yield
    finally:
        _remove(machines)


def _remove(machines: int) -> None:
    for number in range(machines):
        subprocess.run(["ip", "netns", "del", name(number)], capture_output=True)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)
