"""Runs process sets, one after the other: torchrun as a child, a limit of time each, rows as they come.

A set that fails or hangs is reported and the rest goes on.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from paths import HERE, ROOT

from fastusp_backend.environment import inherited

MARK = "BENCHMARK "
GRACE_SECONDS = 40
"""torchrun gives its ranks 30 s to end before it kills them."""

_NO_PEERS = {"NCCL_P2P_DISABLE": "1"}
LINKS = {
    "nvlink": {},
    "slow": _NO_PEERS,
    "sockets": {
        **_NO_PEERS,
        "NCCL_SHM_DISABLE": "1",
        "NCCL_IB_DISABLE": "1",
        "NCCL_SOCKET_IFNAME": "=lo",
        "NCCL_SOCKET_FAMILY": "AF_INET",
    },
}
"""Environments: the machine's own links, all traffic through host memory, and through the loopback interface, as if
each rank were a machine of its own (see `rank.py`)."""


@dataclass(frozen=True, kw_only=True)
class ProcessSet:
    """Ranks that torchrun starts for one job."""

    who: str
    ranks: int
    link: str
    job: dict
    """As rank.py reads it, without `outputs`."""
    module: str = ""
    """What must be installed."""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.who}{self.note}, {self.ranks} ranks, {self.link}"


@dataclass
class Outcome:
    """What all sets gave."""

    rows: list[dict] = field(default_factory=list)
    """One per configuration, with `link` and `set` beside what the rank said."""
    problems: list[str] = field(default_factory=list)
    """Sets that did not end well, for people to read."""
    about: dict = field(default_factory=dict)
    """Device and torch of the ranks."""


def run_all(sets: list[ProcessSet], folder: Path, *, seconds: float, minutes: float) -> Outcome:
    """Runs all sets; each may take `seconds`, and none is started after `minutes`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running set is ended, too
    outcome, started = Outcome(), time.monotonic()
    for number, each in enumerate(sets):
        if each.module and importlib.util.find_spec(each.module) is None:
            problem = "not installed"
        elif time.monotonic() - started > 60 * minutes:
            problem = f"not run: the {minutes:g} minutes are over"
        else:
            began = time.monotonic()
            problem = _run(each, number, folder / str(number), outcome, seconds)
            print(f"# {each}: {time.monotonic() - began:.0f} s", flush=True)
        if problem:
            outcome.problems.append(f"{each}: {problem}")
            print(f"# {outcome.problems[-1]}", flush=True)
    return outcome


def _run(each: ProcessSet, number: int, folder: Path, outcome: Outcome, seconds: float) -> str:
    """Runs one set; returns what went wrong, or nothing."""
    folder.mkdir(parents=True)
    job = folder / "job.json"
    job.write_text(json.dumps(each.job | {"outputs": str(folder), "link": each.link}))
    environment = inherited(os.environ, ROOT) | {"TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={each.ranks}"]
    with open(folder / "errors.txt", "w+") as errors:
        process = subprocess.Popen(
            [*command, str(HERE / "rank.py"), str(job)],
            env=environment | LINKS[each.link],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        expired = threading.Event()
        timers = [threading.Timer(seconds, lambda: (expired.set(), process.terminate()))]
        timers.append(threading.Timer(seconds + GRACE_SECONDS, process.kill))
        for timer in timers:
            timer.daemon = True
            timer.start()
        try:
            for line in process.stdout:
                if line.startswith(MARK):
                    _take(json.loads(line.removeprefix(MARK)), each, number, outcome)
            process.wait()
        finally:
            for timer in timers:
                timer.cancel()
            if process.poll() is None:
                process.terminate()
                process.wait()
        if expired.is_set():
            return f"ended after {seconds:g} s without finishing"
        if process.returncode:
            errors.seek(0)
            return f"ended with code {process.returncode}: {_reason(errors.read())}"
    return ""


def _take(line: dict, each: ProcessSet, number: int, outcome: Outcome) -> None:
    if "about" in line:
        outcome.about |= line["about"]
        return
    outcome.rows.append(line | {"link": each.link, "set": number})
    texts = " and ".join(map(str, line["case"]["texts"]))
    where = f"{line['who']} {line['config']}, {line['case']['size']} px, text {texts}, {line['ranks']} ranks"
    if "failed" in line:
        outcome.problems.append(f"{where}, {each.link}: {line['failed']}")
        print(f"# {outcome.problems[-1]}", flush=True)
    elif "median" in line:  # now, in case the run is cut short
        print(f"#   {where}: {line['median']:.1f} ms", flush=True)


def _reason(errors: str) -> str:
    """Finds the first rank's exception, which torchrun's own account follows."""
    found = re.search(r"(?m)^(?:\[.*?\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception)\b.*)$", errors)
    return (found[1] if found else errors.strip()[-200:])[:300]
