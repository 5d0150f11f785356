"""Why a generation of workers ended, from what it left in its run directory: exit codes, records of failures, logs."""

import json
import re
import signal
from pathlib import Path

LOG_LINES = 12
PRINTED_LINES = 1000
"""Of each file of printed lines, as many are looked through for warnings: NCCL_DEBUG=INFO prints hundreds."""
_ALARMING = re.compile(r"\b(WARN|WARNING|ERROR|FATAL)\b|[Ee]rror\b|Traceback|failed")


def find_cause(directory: Path, otherwise: str) -> str:
    """The rank that failed first, with its error or signal; `otherwise` where no rank has left anything."""
    exits = _read_json(directory / "exit.json") or []
    records = [r for path in directory.glob("failure-*.json") if (r := _read_json(path))]
    told = {record["rank"] for record in records}
    for failed in exits:
        if failed["exitcode"] < 0 and failed["exitcode"] != -signal.SIGTERM and failed["rank"] not in told:
            name = signal.Signals(-failed["exitcode"]).name
            hint = " (killed by hand, or by the system when memory ran out)" if name == "SIGKILL" else ""
            return f"rank {failed['rank']} (process {failed['pid']}) was ended by {name}{hint}"
    if records:
        first = min(records, key=lambda r: (r["peer_lost"], r["time"]))
        return f"rank {first['rank']} failed with {first['text']}"
    if exits:
        return f"rank {exits[0]['rank']} ended with exit code {exits[0]['exitcode']}"
    return otherwise


def last_log_lines(directory: Path) -> list[str]:
    """The last lines of the ranks' log, or else torchrun's, and of what the ranks printed."""
    lines = []
    for line in _tail(directory / "pool.log"):
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
    for path in sorted(directory.glob("ranks/**/std*.log")):
        lines = [f"[rank {path.parent.name} {path.stem}] {line}" for line in _tail(path, PRINTED_LINES)]
        ranks.setdefault(int(path.parent.name), []).extend(lines)
    turns = []  # quiet, turn of its rank, rank, place
    for rank, lines in ranks.items():
        for quiet in (False, True):
            places = [n for n, line in enumerate(lines) if (_ALARMING.search(line) is None) == quiet]
            turns += [(quiet, turn, rank, place) for turn, place in enumerate(reversed(places))]
    chosen = sorted((rank, place) for _, _, rank, place in sorted(turns)[:LOG_LINES])
    return [ranks[rank][place] for rank, place in chosen]


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None  # absent, or its writer died in the middle of it


def _tail(path: Path, count: int = LOG_LINES) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
    except FileNotFoundError:
        return []
