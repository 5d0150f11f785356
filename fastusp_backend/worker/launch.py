"""torchrun for one pool: `python -m fastusp_backend.worker.launch <torchrun arguments>`."""

import contextlib
import os
import signal
import sys
from pathlib import Path

from .process import PARENT_VARIABLE, RUN_DIR_VARIABLE, die_with_parent, importing, leave


def main(arguments: list[str]) -> int:
    die_with_parent(int(os.environ[PARENT_VARIABLE]))
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # for the ranks
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as some supervisors leave it, it hides how ranks ended
    # Not above: importing torch takes seconds, in which this process would outlive its parent.
    with importing():
        from .torchrun import run

        if os.environ["FASTUSP_DEVICE_TYPE"] == "cpu":  # on GPUs forks are not tried yet
            from . import __main__ as worker
            from .forked import start_by_fork

            with contextlib.suppress(Exception):  # which each rank meets as well, and reports
                from . import rank  # noqa: F401
            start_by_fork(lambda: leave(worker.main()))
    return run(arguments, Path(os.environ[RUN_DIR_VARIABLE]))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
