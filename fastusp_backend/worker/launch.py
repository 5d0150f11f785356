"""torchrun for one pool: `python -m fastusp_backend.worker.launch <torchrun arguments>`.

Runs torch.distributed.run in this process, so that it can tie its life to its parent's and say who ended first:
exit.json in the run directory holds [{rank, pid, exitcode}] in the order in which torchrun noticed; rank is null for
torchrun itself, which was told to end by a signal.
"""

import json
import os
import sys
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .process import PARENT_VARIABLE, RUN_DIR_VARIABLE, die_with_parent

KILLING_SECONDS = 20
"""Ranks that outlive the first that fails are told to end, and killed by torchrun 30 s later: not a fault of theirs."""


def main(arguments: list[str]) -> int:
    die_with_parent(int(os.environ[PARENT_VARIABLE]))
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # for the ranks
    run_dir = Path(os.environ[RUN_DIR_VARIABLE])
    try:
        torchrun.run(torchrun.parse_args(arguments))
        return 0
    except ChildFailedError as error:
        first = min(failure.timestamp for failure in error.failures.values())
        exits = [
            {"rank": rank, "pid": failure.pid, "exitcode": failure.exitcode}
            for rank, failure in error.failures.items()
            if failure.timestamp - first < KILLING_SECONDS
        ]
    except SignalException as error:
        exits = [{"rank": None, "pid": os.getpid(), "exitcode": -error.sigval}]
    (run_dir / "exit.json").write_text(json.dumps(exits), encoding="utf-8")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
