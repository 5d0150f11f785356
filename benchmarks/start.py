"""What a pool's start takes, from outside: when its processes are there, have mapped torch and CUDA, and are ready.

    python benchmarks/start.py --gpus 0,1
    python benchmarks/start.py --gpus cpu:2 --runs 2

Seconds since the pool was asked for, as /proc has them every 10 ms; of the ranks the last one's. The first run of a
machine also reads torch's libraries from the disk.
"""

import argparse
import os
import time
from pathlib import Path

import paths  # noqa: F401

from fastusp_backend.cli.table import Column, Table
from fastusp_backend.devices import local_devices
from fastusp_backend.pool import Pool

EVENTS = {
    "torchrun": (False, ""),
    "torchrun has torch": (False, "libtorch_python"),
    "ranks": (True, ""),
    "ranks have torch": (True, "libtorch_python"),
    "ranks have CUDA": (True, "libcuda.so"),
}
"""By name: whether it is of the ranks, and the library that their memory then has."""


def family(pid: int) -> dict[bool, set[int]]:
    """Processes that this one has started: torchrun, and, under True, the ranks."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            rest = path.read_text().rpartition(")")[2].split()
            parents[int(path.parent.name)] = int(rest[1])
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
    children = {child for child, parent in parents.items() if parent == pid and is_worker(child)}
    return {False: children, True: {child for child, parent in parents.items() if parent in children}}


def is_worker(pid: int) -> bool:
    return b"fastusp_backend.worker" in read(pid, "cmdline")


def read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def start(gpus: str) -> dict[str, float]:
    """Returns when each of EVENTS was, and when the ranks were ready."""
    devices = local_devices(gpus)
    began, found, pool = time.perf_counter(), {}, Pool(devices)
    try:
        workers = pool.start()
        while workers.ready is None:
            if not workers.alive:
                raise SystemExit("\n".join(pool.log_since(0)[0]) or "the workers ended")
            processes = family(os.getpid())
            for event, (ranks, library) in EVENTS.items():
                some = processes[ranks]
                if event not in found and len(some) == (devices.ranks if ranks else 1):
                    if all(library.encode() in read(pid, "maps") for pid in some):
                        found[event] = time.perf_counter() - began
            time.sleep(0.01)
        return found | {"ready": time.perf_counter() - began}
    finally:
        pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="all", help="as USP Loader's `gpus`")
    parser.add_argument("--runs", type=int, default=3)
    a = parser.parse_args()
    names = [*EVENTS, "ready"]
    table = Table(Column("run"), *(Column(name, format=".1f") for name in names), markdown=True)
    print(table.head())
    for number in range(a.runs):
        found = start(a.gpus)
        print(table.row(number + 1, *(found.get(name, "-") for name in names)), flush=True)


if __name__ == "__main__":
    main()
