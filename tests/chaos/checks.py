"""What must be so after a fault."""

import os
import re
import threading
import time
from pathlib import Path

from support import open_descriptors

from .faults import Fault
from .scene import Ending
from .world import World

ERRORS = ("died", "refused")
_SHM = Path("/dev/shm")


def judge(world: World, fault: Fault, ending: Ending) -> list[str]:
    """What is wrong with the way in which a request with a fault ended."""
    found = [*ending.findings]
    if ending.hung:
        return ["HANG: it had to be ended by the clock"]
    if ending.how == "result":
        found += judge_latents(world, fault.request, ending, fault.is_right(ending.latents))
    elif not ending.struck:
        found.append(f"it was {ending.how} before the fault: {first_line(ending.error)}")
    elif ending.how not in (*fault.allowed, "replaced"):
        found.append(f"it was {ending.how}, not {' or '.join(sorted(fault.allowed)) or 'answered'}: {ending.error!r}")
    elif ending.how != "replaced" and ending.seconds > fault.limit:
        found.append(f"{ending.seconds:.1f} s to the error, more than {fault.limit:.0f}")
    if ending.how in ERRORS and not re.search(fault.names, str(ending.error), re.DOTALL):
        found.append(f"the error does not say {fault.names!r}: {ending.error}")
    return found


def judge_latents(world: World, request, ending: Ending, latents: str) -> list[str]:
    if latents == "wrong":
        return ["WRONG LATENTS"]
    if latents == "rounding" and not world.moved(request):
        return ["LATENTS: other bits, though the weights lie where they lay"]
    return []


def first_line(error: BaseException | None) -> str:
    if error is None:
        return ""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class Traces:
    """What the pool and its processes leave behind, beside those that live. Made when nothing is wrong yet."""

    def __init__(self, world: World):
        self._world = world
        self._descriptors, self._threads = open_descriptors(), threading.active_count()
        self._shm = _names(_SHM)

    def look(self, seconds: float = 5.0) -> list[str]:
        """What is still there after so many seconds."""
        deadline = time.monotonic() + seconds
        while (found := self._found()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _found(self) -> list[str]:
        live = self._world.run_dir
        found = [f"ORPHAN: {who}" for who in _processes_without(self._world.base, live)]
        for folder in self._world.base.glob(f"fastusp-{os.getuid()}/*"):
            if re.fullmatch("[0-9a-f]{12}", folder.name) and folder != live:
                found.append(f"run directory {folder}")
        if new := _names(_SHM) - self._shm - _in_use(_SHM):
            found.append(f"/dev/shm: {', '.join(sorted(new))}")
        if (now := open_descriptors()) > self._descriptors + 4:
            found.append(f"{now} descriptors, {self._descriptors} at first")
        if (now := threading.active_count()) > self._threads + 2:
            names = ", ".join(thread.name for thread in threading.enumerate())
            found.append(f"{now} threads, {self._threads} at first: {names}")
        return found


def _processes_without(base: Path, live: Path | None) -> list[str]:
    """Those of pools in `base` whose run directory is not `live`."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        own = [os.fsdecode(v.partition(b"=")[2]) for v in variables if v.startswith(b"FASTUSP_RUN_DIR=")]
        if own and own[0].startswith(f"{base}/") and own[0] != str(live):
            found.append(f"process {entry.name} of {own[0]}: {command[:80]}")
    return found


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.exists() else set()


def _in_use(folder: Path) -> set[str]:
    """Names of files there that a process maps: other programs', or a live pool's."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = maps.read_text()
        except OSError:
            continue
        found |= set(re.findall(rf"{re.escape(str(folder))}/(\S+)", text))
    return found
