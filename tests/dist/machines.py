"""Machines for tests: network namespaces of this host, joined by a bridge, on which each has an address of its own."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

PREFIX = f"fu{os.getpid()}"
"""Of all names, which have 15 characters at most: other tests may run on this host."""
NETWORK = f"10.213.{os.getpid() % 256}"
BRIDGE = f"{PREFIX}-br"
HOST = f"{NETWORK}.254"


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
