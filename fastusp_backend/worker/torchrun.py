"""torch.distributed.run in this process, so that it listens nowhere, and can say who ended first: exit.json in the run
directory holds [{rank, pid, exitcode}] in the order in which torchrun noticed; rank is null for torchrun itself, which
was told to end by a signal.
"""

import json
import os
from pathlib import Path

from torch.distributed import HashStore
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from .process import STORE_VARIABLE

KILLING_SECONDS = 20
"""Ranks that outlive the first that fails are told to end, and killed by torchrun 30 s later: not a fault of theirs."""


class Alone(RendezvousHandler):
    """The rendezvous of a torchrun that meets no other: its store is this process's memory. torch's own keep theirs
    behind a port of all interfaces, and c10d's unpickles what anybody writes there."""

    NAME = "fastusp"

    def __init__(self, parameters: RendezvousParameters):
        self._run_id = parameters.run_id

    def get_backend(self) -> str:
        return self.NAME

    def get_run_id(self) -> str:
        return self._run_id

    def next_rendezvous(self) -> RendezvousInfo:
        # No address: the ranks meet in a file.
        return RendezvousInfo(HashStore(), rank=0, world_size=1, bootstrap_store_info=RendezvousStoreInfo("", 0))

    def num_nodes_waiting(self) -> int:
        return 0

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nobody else could come."""

    def shutdown(self) -> bool:
        return True


def run(arguments: list[str], run_dir: Path) -> int:
    """Its exit code. arguments: torchrun's."""
    # Groups are made while the pool lives, however long; what lies on a disk may be cleaned away meanwhile.
    store = os.memfd_create("fastusp-store", os.MFD_CLOEXEC)
    os.environ[STORE_VARIABLE] = f"/proc/{os.getpid()}/fd/{store}"
    rendezvous_handler_registry.register(Alone.NAME, Alone)
    try:
        torchrun.run(torchrun.parse_args([f"--rdzv-backend={Alone.NAME}", "--rdzv-endpoint=memory", *arguments]))
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
