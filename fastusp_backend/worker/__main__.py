"""One rank of a pool; started by torchrun as `-m fastusp_backend.worker`."""

import logging
import os
from pathlib import Path

from ..pulse import turn_to
from .process import (
    PARENT_VARIABLE,
    RUN_DIR_VARIABLE,
    die_with_parent,
    importing,
    leave,
    log_to_pool,
    record_failure,
    show_pulse,
)

log = logging.getLogger(__name__)

STARTING = "while it started"


def main() -> int:
    die_with_parent(int(os.environ[PARENT_VARIABLE]))
    run_dir, rank = Path(os.environ[RUN_DIR_VARIABLE]), int(os.environ["RANK"])
    log_to_pool(run_dir, rank)
    try:
        show_pulse(run_dir, rank)
        turn_to(STARTING)
        # Not above: importing torch takes seconds, in which this process would outlive its parent and show no pulse.
        with importing():
            from .rank import work

        work(run_dir)
    except BaseException as error:
        try:
            log.exception("rank %d failed", rank)
            record_failure(run_dir, rank, error)
        finally:
            # Threads and process groups of a failed rank may hang on their way out: leave at once, also where no trace
            # can be left, as on a full disk.
            os._exit(1)
    return 0


if __name__ == "__main__":
    leave(main())
