"""torchrun for one pool: `python -m fastusp_backend.worker.launch <torchrun arguments>`.

Runs torch.distributed.run in this process, so that it can tie its life to its parent's and say which rank failed first:
exit.json in the run directory holds [{rank, pid, exitcode}].
"""

import json
import os
import sys
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .process import PARENT_VARIABLE, RUN_DIR_VARIABLE, die_with_parent


def main(arguments: list[str]) -> int:
    die_with_parent(int(os.environ[PARENT_VARIABLE]))
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # for the ranks
    run_dir = Path(os.environ[RUN_DIR_VARIABLE])
    try:
        torchrun.run(torchrun.parse_args(arguments))
    except ChildFailedError as error:
        failures = [
            {"rank": rank, "pid": failure.pid, "exitcode": failure.exitcode}
            for rank, failure in sorted(error.failures.items())
        ]
        (run_dir / "exit.json").write_text(json.dumps(failures), encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
