"""The command."""

import argparse
import sys
import time
import traceback
from pathlib import Path

from fastusp_backend.devices import local_devices

from .faults import KINDS
from .report import summary, table
from .requests import MODELS
from .run import Run
from .world import World


def arguments() -> argparse.Namespace:
    listed = "\n".join(f"  {name:12} {(kind.__doc__ or '').splitlines()[0]}" for name, kind in KINDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Harms a pool of workers at random, again and again, and looks at what comes of it: how long until "
        "the error and what it says, whether the next prompt is right to the bit, what is left behind.",
        epilog=f"kinds of faults:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpus", default="cpu:2", help="as USP Loader takes it: cpu:2, cpu:3, or 0,1")
    parser.add_argument("--seed", type=int, default=1, help="decides every fault")
    parser.add_argument(
        "--seconds",
        type=float,
        default=600.0,
        help="no fault begins after so many, counted from when the right answers are known",
    )
    parser.add_argument("--faults", type=int, default=1 << 30, help="how many at most")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of faults, separated by commas; all by default")
    parser.add_argument("--only", type=int, help="the number of the one fault to try, with the same seed and kinds")
    parser.add_argument("--models", type=int, choices=(2, 3), default=3, help="how many model files")
    parser.add_argument("--json", type=Path, help="a file for a line of JSON a fault")
    chosen = parser.parse_args()
    unknown = set(chosen.kinds.split(",")) - KINDS.keys()
    if unknown:
        parser.error(f"--kinds: {', '.join(sorted(unknown))} is none of {', '.join(KINDS)}")
    return chosen


def main() -> int:
    chosen = arguments()
    kinds = tuple(chosen.kinds.split(","))
    began = time.monotonic()
    world = World(local_devices(chosen.gpus), MODELS[: chosen.models])
    records = []
    if world.no_disk and "disk" in kinds:
        print(f"skipped: disk: {world.no_disk}", flush=True)
        kinds = tuple(kind for kind in kinds if kind != "disk")
    told = f"--gpus {chosen.gpus} --seed {chosen.seed} --kinds {','.join(kinds)} --models {chosen.models}"
    print(f"python -m tests.chaos {told}", flush=True)
    try:
        numbers = range(1, chosen.faults + 1) if chosen.only is None else [chosen.only]
        run = Run(world, chosen.seed, kinds, numbers)
        print(f"{len(world.expected)} answers known after {time.monotonic() - began:.0f} s", flush=True)
        began = time.monotonic()
        for number in numbers:
            if time.monotonic() - began > chosen.seconds:
                break
            record = run.play(number)
            records.append(record)
            print(record, flush=True)
            if record.findings:
                print(f"    again: python -m tests.chaos {told} --only {number}", flush=True)
            if chosen.json is not None:
                with open(chosen.json, "a") as file:
                    print(record.as_json(), file=file)
    except KeyboardInterrupt:
        traceback.print_exc()
        print("stopped by Ctrl-C", flush=True)
    finally:
        world.close()
    print(table(records))
    print(summary(records))
    return int(any(record.findings for record in records))


if __name__ == "__main__":
    sys.exit(main())
