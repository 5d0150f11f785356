"""Why worker processes ended, from what it left in its run directory: exit codes, records of failures, logs."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

from ..config import FileState, ModelSpec

LOG_LINES = 12
PRINTED_LINES = 1000
"""How many lines of each printed file are looked through for warnings: NCCL_DEBUG=INFO prints hundreds."""
_ALARMING = re.compile(r"\b(WARN|WARNING|ERROR|FATAL)\b|[Ee]rror\b|Traceback|failed")
_HINTS = {
    "SIGKILL": " (killed by hand, or by the system when memory ran out)",
    "SIGINT": " (Ctrl-C, or another process asked it to end)",
    "SIGTERM": " (another process asked it to end)",
}


KILLED = 2
"""Of `ranked_cause`: what ended the processes was the pool."""
UNTOLD = 5
"""Behind all that `ranked_cause` ranks: nobody can tell."""


def find_cause(directory: Path, torchrun: subprocess.Popen, killed: bool, model: ModelSpec | None) -> str:
    """Names what ended first: the rank, with its error, signal or exit code, or torchrun. As `ranked_cause`."""
    return ranked_cause(directory, torchrun, killed, model)[1]


def ranked_cause(directory: Path, torchrun: subprocess.Popen, killed: bool, model: ModelSpec | None) -> tuple[int, str]:
    """`find_cause`, and how likely it is the cause of all that ended, the least most.

    killed: whether the pool ended it.
    model: the model of the last request.

    A rank that left no record goes before all others: the others' errors may be its doing. torchrun sends SIGTERM to
    those that outlive the first, or the signal that it was sent itself: a rank that was asked to end is blamed only
    where nobody else can be, and one that merely lost another goes last.
    """
    causes: list[tuple[int, float, str]] = []  # the least first
    records = [r for path in listed(directory, "failure-*.json") if (r := _read_json(path))]
    told, turns = {record["rank"] for record in records}, {}
    for turn, exited in enumerate(_read_json(directory / "exit.json") or []):
        rank, code = exited["rank"], exited["exitcode"]
        turns[rank] = turn
        if rank is None:
            causes.append((2, turn, _end("torchrun", exited["pid"], code, model)))
        elif rank not in told:
            causes.append((3 if code == -signal.SIGTERM else 0, turn, _end(f"rank {rank}", exited["pid"], code, model)))
    for record in records:
        text = f"rank {record['rank']} failed with {record['text']}"
        asked = record["text"].startswith(KeyboardInterrupt.__name__)  # by SIGINT
        if asked:  # of those that were asked to end, the first to end is the one that somebody asked
            causes.append((3, turns.get(record["rank"], 0), text))
        else:
            causes.append((4 if record["peer_lost"] else 1, record["time"], text))
    if killed:
        causes.append((KILLED, 0, "their processes did not end by themselves, so the pool ended them"))
    elif torchrun.returncode is not None and torchrun.returncode < 0:
        causes.append((2, 0, _end("torchrun", torchrun.pid, torchrun.returncode, model)))
    if causes:
        first = min(causes)
        return first[0], first[2]
    if torchrun.returncode is None:
        return KILLED, "its processes are still running"
    return KILLED, f"torchrun ended with exit code {torchrun.returncode}"


def _end(who: str, pid: int, code: int, model: ModelSpec | None) -> str:
    if code >= 0:
        return f"{who} (process {pid}) ended with exit code {code} and left no record of why"
    name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
    return f"{who} (process {pid}) was ended by {name}{hint(name, model)}"


def hint(signal: str, model: ModelSpec | None) -> str:
    """What to say behind the name of the signal that ended a rank, which was given requests for `model`."""
    if signal != "SIGBUS":
        return _HINTS.get(signal, "")
    change = _change(model) if model is not None else ""
    if change:
        return f": {model.path} {change} while it was in use; get the whole file again"
    mapped = f"{model.path} or " if model is not None else ""
    return f" (a mapped file could not be read: look at the disk of {mapped}the room in /dev/shm)"


def _change(model: ModelSpec) -> str:
    if model.fingerprint:
        return ""  # a name alone: which file it is here the ranks know
    try:
        return model.file.change_to(FileState.of(os.stat(model.path)))
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def full_disk(directory: Path) -> str:
    """What to add where nothing more can be written to a run directory: records of failures may lack in it."""
    try:
        disk = os.statvfs(directory)
    except FileNotFoundError:
        return ""  # the pool was closed meanwhile
    if disk.f_bavail and (disk.f_favail or not disk.f_files):  # no files: a system that does not count them
        return ""
    return f" (free space and inodes, or set TMPDIR to another directory: nothing more can be written to {directory})"


def last_log_lines(directory: Path) -> list[str]:
    """The last lines of the ranks' log, or else torchrun's, and of what the ranks printed."""
    lines = []
    for line in (_tail(directory / "pool.log.1") + _tail(directory / "pool.log"))[-LOG_LINES:]:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # its writer died in the middle of it
        trace = record.get("trace", "").strip().splitlines()[-1:]
        lines.append(" ".join([f"[rank {record['rank']}] {record['level']}: {record['text']}", *trace]))
    if not lines:
        lines = _tail(directory / "torchrun.log")
    return lines + printed_lines(directory)


def printed_lines(directory: Path) -> list[str]:
    """What the ranks printed last (NCCL writes to stdout), in the order of ranks: of each as many lines as of the
    others, warnings and errors before anything else."""
    ranks: dict[int, list[str]] = {}
    for path in listed(directory, "ranks/**/std*.log"):
        lines = [f"[rank {path.parent.name} {path.stem}] {line}" for line in _tail(path, PRINTED_LINES)]
        ranks.setdefault(int(path.parent.name), []).extend(lines)
    turns = []  # quiet, turn of its rank, rank, place
    for rank, lines in ranks.items():
        for quiet in (False, True):
            places = [n for n, line in enumerate(lines) if (_ALARMING.search(line) is None) == quiet]
            turns += [(quiet, turn, rank, place) for turn, place in enumerate(reversed(places))]
    chosen = sorted((rank, place) for _, _, rank, place in sorted(turns)[:LOG_LINES])
    return [ranks[rank][place] for rank, place in chosen]


def listed(directory: Path, pattern: str) -> list[Path]:
    """The files of a run directory that a pattern fits, in order; none where it cannot be read."""
    try:
        return sorted(directory.glob(pattern))
    except OSError:
        return []  # this process can open no file, or the pool is being closed


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None  # absent, or its writer died in the middle of it; or this process can open no file


def _tail(path: Path, count: int = LOG_LINES) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
    except OSError:
        return []
