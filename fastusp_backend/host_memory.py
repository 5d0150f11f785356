"""Host memory that can still be allocated, by the system's account and by those of the control groups (cgroups) that
limit containers. It has to be asked for first: Linux grants memory that it does not have, and ends processes later."""

import os
from collections.abc import Iterator
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def available() -> int | None:
    """Bytes that this process can still allocate; None where the system does not say."""
    try:
        lines = _MEMINFO.read_text().splitlines()
        system = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return min([system, *_left_in_groups()])


def total() -> int:
    """Bytes that the host has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident() -> int | None:
    """Bytes of this process that lie in memory, what it maps of files included; None where the system does not say."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _left_in_groups() -> Iterator[int]:
    """Bytes that each memory group which this process is in has left."""
    try:
        entries = [line.split(":", 2) for line in _OWN_GROUPS.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in entries:
        if not controllers:
            root, names = _GROUPS, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            root, names = _GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        own = root / path.lstrip("/")
        for group in [own, *own.parents]:  # any of them may set the limit; in a container some are not mounted
            if group == root.parent:
                break
            left = _left(group, *names)
            if left is not None:
                yield left


def _left(group: Path, limit: str, usage: str, prefix: str) -> int | None:
    """A group's limit less what it uses, without the page cache, which goes when memory is needed. None where it has no
    limit."""
    try:
        most = (group / limit).read_text().strip()
        if most == "max":
            return None
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / usage).read_text())
    except OSError:
        return None
    cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return max(0, int(most) - max(0, used - cache))
