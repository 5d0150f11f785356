"""What a process listens at, by what the system tells of it."""

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path


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
        try:
            target = os.readlink(entry)
        except FileNotFoundError:
            continue  # it was closed meanwhile
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
