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

from .meeting import meeting_of
from .process import STORE_VARIABLE

KILLING_SECONDS = 20
"""Ranks that outlive the first that fails are told to end, and killed by torchrun 30 s later: not a fault of theirs."""


class Rendezvous(RendezvousHandler):
    """That of a torchrun that meets no other, whose store is this process's memory, or of one that meets others in the
    server's (`meeting`). torch's own keep theirs behind a port of all interfaces, and c10d's unpickles what anybody
    writes there."""

    NAME = "fastusp"

    def __init__(self, parameters: RendezvousParameters):
        self._run_id = parameters.run_id
        self._meeting = meeting_of(os.environ)
        self._store = self._meeting.store() if self._meeting else HashStore()

    def get_backend(self) -> str:
        return self.NAME

    def get_run_id(self) -> str:
        return self._run_id

    def next_rendezvous(self) -> RendezvousInfo:
        # No address: the ranks meet in a file, or likewise.
        machine, machines = (self._meeting.machine, self._meeting.machines) if self._meeting else (0, 1)
        where = RendezvousStoreInfo("", 0)
        return RendezvousInfo(self._store, rank=machine, world_size=machines, bootstrap_store_info=where)

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
    rendezvous_handler_registry.register(Rendezvous.NAME, Rendezvous)
    try:
        torchrun.run(torchrun.parse_args([f"--rdzv-backend={Rendezvous.NAME}", "--rdzv-endpoint=memory", *arguments]))
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
