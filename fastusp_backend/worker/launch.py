"""torchrun for one pool: `python -m fastusp_backend.worker.launch <torchrun arguments>`."""

import os
import sys
from pathlib import Path

from .process import PARENT_VARIABLE, RUN_DIR_VARIABLE, die_with_parent, importing, leave


def main(arguments: list[str]) -> int:
    die_with_parent(int(os.environ[PARENT_VARIABLE]))
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # for the ranks
    # Not above: importing torch takes seconds, in which this process would outlive its parent.
    with importing():
        from .torchrun import run

    return run(arguments, Path(os.environ[RUN_DIR_VARIABLE]))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
