"""Where a rank, or a torchrun, of several machines meets the others."""

from collections.abc import Mapping
from typing import NamedTuple

from ..meeting import MeetingStore
from .process import MEETING_VARIABLE


class Meeting(NamedTuple):
    """See `MEETING_VARIABLE`."""

    run: str
    machine: int
    machines: int
    address: str
    key: str

    def store(self) -> MeetingStore:
        """Raises as `MeetingStore`."""
        return MeetingStore(self.address, self.key, self.run)


def meeting_of(environment: Mapping[str, str]) -> Meeting | None:
    """None on a machine that has all ranks."""
    if MEETING_VARIABLE not in environment:
        return None
    run, machine, machines, address, key = environment[MEETING_VARIABLE].split(" ", 4)
    return Meeting(run, int(machine), int(machines), address, key)
