"""Machines for tests: network namespaces of this host, joined by a bridge, on which each has an address of its own; and
a server on all of them."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
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


def run(*command: str) -> str:
    """What it prints. Raises OSError where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


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
def shaped(number: int, *how: str) -> Iterator[Callable[[], dict]]:
    """What the machine sends goes through one of the system's queues, as `tc` calls it. Yields what tells its counts:
    of `drops`, and of `overlimits`, packets that had to wait. Raises OSError where the system has none such."""
    device = ("dev", f"{name(number)}-in")
    run(*inside(number), "tc", "qdisc", "add", *device, "root", *how)

    def counts() -> dict:
        return json.loads(run(*inside(number), "tc", "-s", "-j", "qdisc", "show", *device))[0]

    try:
        yield counts
    finally:
        run(*inside(number), "tc", "qdisc", "del", *device, "root")


class Cluster:
    """`serve` on each of the machines from 0 on, with so many CPU ranks each, and folders of their own: `key`, of which
    the private one is machine 0's alone, and `models`."""

    def __init__(self, folder: Path, count: int, ranks: int, model: Path):
        self.port = next(PORTS)
        self._folder, self._count, self._ranks = folder, count, ranks
        for number in range(count):
            self.models(number).mkdir(parents=True)
            shutil.copy(model, self.models(number) / model.name)
        Key.read_or_make(self.key)  # for all to start at once
        for number in range(1, count):
            shutil.copy(self.key, self._home(number))
        self._ended: list[Serving] = []
        self.servers = [self.start(number, self._home(number)) for number in range(count)]

    def _home(self, number: int) -> Path:
        return self._folder / f"machine-{number}"

    def models(self, number: int) -> Path:
        return self._home(number) / "models"

    @property
    def key(self) -> Path:
        return self._home(0) / "key"

    def start(self, number: int, folder: Path) -> Serving:
        """folder: which has the key."""
        arguments = ["--gpus", f"cpu:{self._ranks}", "--nnodes", str(self._count), "--node-rank", str(number)]
        arguments += ["--rdzv-endpoint", f"{address(0)}:{self.port}", "--trust-network"]
        return Serving(folder, *arguments, "--models", str(self.models(number)), listen=None, prefix=inside(number))

    def start_again(self, number: int) -> None:
        """Returns when it has joined the others, or one of them has joined it."""
        self._ended.append(self.servers[number])  # with the clients that attach anew
        self.servers[number] = self.start(number, self._home(number))
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
        for server in [*reversed(self.servers), *self._ended]:
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
