"""`doctor`: what is wrong with this machine, and what to do about it.

It looks first (`facts`, `checks`), which starts no workers, then lets the pool work (`trial`).
"""

import argparse
import dataclasses
import json
import os
import sys

from ... import __version__
from ...devices import parse_devices
from ...errors import DeviceError
from ..arguments import add_gpus
from .check import Check, verdict, worst
from .checks import examine
from .facts import SHOWN, Facts, gather


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_gpus(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help=f"everything as one JSON object, for bug reports; of the environment, reports show {', '.join(SHOWN)}",
    )
    parser.add_argument(
        "--seconds", type=float, default=240.0, help="limit of each trial, its start included (default 240)"
    )


def run(arguments: argparse.Namespace) -> int:
    checks: list[Check] = []

    def tell(*found: Check) -> None:
        checks.extend(found)
        if not arguments.json:
            print(*found, sep="\n", flush=True)

    facts = None
    try:
        _say("looking at this machine")
        facts = gather(parse_devices(arguments.gpus), arguments.gpus)
        tell(*examine(facts))
    except DeviceError as error:
        tell(Check("devices", "fail", str(error), "Look at nvidia-smi, or examine CPU ranks: --gpus cpu:2"))
    if worst(checks) == "fail":
        tell(Check("trial", "warn", "skipped: fix what failed above first"))
    else:
        from .trial import trials  # not above: what it needs was missing, if a check failed

        os.environ.setdefault("NCCL_DEBUG", "WARN")  # into the log lines of a pool that fails
        for check in trials(facts.devices, arguments.seconds, _say):
            tell(check)
    if arguments.json:
        print(json.dumps(report(facts, checks), indent=1))
    else:
        print(f"\n{verdict(checks, facts.devices if facts else None)}")
    return 1 if worst(checks) == "fail" else 0


def report(facts: Facts | None, checks: list[Check]) -> dict:
    return {
        "fastusp": __version__,
        "worst": worst(checks),
        "checks": [dataclasses.asdict(check) for check in checks],
        "facts": dataclasses.asdict(facts) if facts else None,
    }


def _say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)
