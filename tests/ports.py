"""Ports for what tests start, and benchmarks."""

import contextlib
import random
import socket
from pathlib import Path


def free_port() -> int:
    """A port of the loopback interface for what listens later, or again: one that the system gives nobody who asks for
    any, as other tests do meanwhile, and which other processes of this run hardly choose."""
    given = range(*map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()))
    ports = [port for port in range(20000, 65536) if not given.start <= port <= given.stop]
    choice = random.SystemRandom()  # tests seed the others
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):  # somebody listens there
            probe.bind(("127.0.0.1", choice.choice(ports or range(20000, 65536))))
            return probe.getsockname()[1]
