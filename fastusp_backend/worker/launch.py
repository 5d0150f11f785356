"""torchrun for one pool: `python -m fastusp_backend.worker.launch <torchrun arguments>`."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from .process import PARENT_VARIABLE, RUN_DIR_VARIABLE, die_with_parent, importing, leave


def main(arguments: list[str]) -> int:
    die_with_parent(int(os.environ[PARENT_VARIABLE]))
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # for the ranks
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as some supervisors leave it, it hides how ranks ended
    show_gpus = _hide_gpus()

    def begin() -> NoReturn:
        show_gpus()
        leave(worker.main())

    began = time.monotonic()
    _tell("importing torch")
    # Not above: importing torch takes seconds, in which this process would outlive its parent.
    with importing():
        from . import __main__ as worker
        from .forked import start_by_fork
        from .torchrun import run

        with contextlib.suppress(Exception):  # which each rank meets as well, and reports
            from . import rank  # noqa: F401
        start_by_fork(begin)
    _tell(f"imported torch in {time.monotonic() - began:.1f} s; the ranks begin")
    return run(arguments, Path(os.environ[RUN_DIR_VARIABLE]))


def _tell(text: str) -> None:
    """Writes a line to torchrun's log, for people who wait: before the ranks begin nobody else says anything. A full
    disk, which the ranks tell of themselves, ends nothing here."""
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), f"{text}\n".encode())


def _hide_gpus() -> Callable[[], None]:
    """A process that has asked CUDA for GPUs is not to be forked. torchrun asks for all that it sees, since torch 2.9,
    to have ranks run on their NUMA nodes (here they see to it themselves: nearby.py); of none it asks NVML alone.

    Returns what undoes it.
    """
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    before = {name: os.environ.get(name) for name in hidden}
    os.environ |= hidden

    def show() -> None:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value

    return show


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
