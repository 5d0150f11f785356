"""Whether a server's machines may be slower together than one of them: told before anything runs on them."""

import functools
import logging

from ..fastusp_backend.config import Layout
from ..fastusp_backend.devices import Devices, ServerDevices

log = logging.getLogger(__name__)


def may_be_slower(devices: Devices, layouts: tuple[Layout, ...]) -> str | None:
    """Says that they may, and who knows it; None where the ranks of a sequence share a machine. The network is not
    known here, nor whether a prompt's cfg lets batch groups divide it, between which hardly anything travels."""
    if not isinstance(devices, ServerDevices) or devices.per_machine >= layouts[-1].sequence_ranks:
        return None
    machines = devices.ranks // devices.per_machine
    command = f"python -m fastusp_backend plan FILE --nnodes {machines} --network GBIT"
    return f"{machines} machines may be slower than one at cfg 1: `{command}` there predicts both"


def warn_if_slower(devices: Devices, layouts: tuple[Layout, ...]) -> bool:
    """Whether it may be so: then it warns of it."""
    text = may_be_slower(devices, layouts)
    if text is not None:
        _tell(f"{devices}: {text}")
    return text is not None


@functools.cache
def _tell(text: str) -> None:
    """Warns once a process."""
    log.warning("FastUSP: %s", text)
