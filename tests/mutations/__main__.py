"""`python -m tests.mutations`: makes each change of the list in a copy of the tree, runs the tests that should notice,
and prints what came of it: a line per change, then the share that fell.

Ends with 1 where less than 95 % fall, or where the tests fail without any change, which is tried first.
"""

import argparse
import concurrent.futures
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .change import Change
from .changes import CHANGES

ROOT = Path(__file__).resolve().parents[2]
ENOUGH = 0.95
TEST_SECONDS, SECONDS = 60, 180
"""How long one test and all tests of a change may take; a change that makes them hang has fallen."""
FIRST_SECONDS = 1800
"""How long all tests together may take without a change."""


def copy_tree(to: Path) -> Path:
    """Copies the files that git knows or would take, without what is built or fetched."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(command, cwd=ROOT, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)
    return to


def run_tests(tree: Path, tests: Sequence[str], seconds: float, *options: str) -> tuple[bool, str]:
    """Whether the tests pass, and what pytest printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *tests]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as printed:  # a pipe would be waited for while ranks have it
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(seconds)
            said = ""
        except subprocess.TimeoutExpired:
            said = f"\nno end within {seconds} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        printed.seek(0)
        return process.returncode == 0, printed.read() + said


def outcome(change: Change) -> tuple[bool, float]:
    """Whether its tests noticed a change, and in how many seconds."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fastusp-mutation-") as folder:
        tree = copy_tree(Path(folder))
        change.make(tree)
        passed, _ = run_tests(tree, change.tests, SECONDS, "-x", f"--timeout={TEST_SECONDS}")
    return not passed, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", default="", help="changes whose file or description has this in it")
    parser.add_argument("--jobs", type=int, default=max(1, len(os.sched_getaffinity(0)) // 2), help="at a time")
    parser.add_argument("--list", action="store_true", help="print the changes and their tests, and make none")
    arguments = parser.parse_args()
    wanted = [change for change in CHANGES if arguments.only in str(change)]
    if arguments.list:
        for change in wanted:
            print(f"{change}  [{' '.join(change.tests)}]")
        return 0
    if not wanted:
        print(f"no change has {arguments.only!r} in its file or description")
        return 1
    tests = sorted({test for change in wanted for test in change.tests})
    with tempfile.TemporaryDirectory(prefix="fastusp-mutation-") as folder:
        at_a_time = "-n", str(arguments.jobs)
        passed, printed = run_tests(copy_tree(Path(folder)), tests, FIRST_SECONDS, *at_a_time)
    if not passed:
        print("The tests fail without any change:", *printed.splitlines()[-15:], sep="\n  ")
        return 1
    fell = 0
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as jobs:
        for change, (noticed, seconds) in zip(wanted, jobs.map(outcome, wanted), strict=True):
            fell += noticed
            print(f"{'fell' if noticed else 'UNNOTICED':9} {seconds:6.1f} s  {change}", flush=True)
    print(f"{fell} of {len(wanted)} changes fell: {fell / len(wanted):.1%}")
    return 0 if fell >= ENOUGH * len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
