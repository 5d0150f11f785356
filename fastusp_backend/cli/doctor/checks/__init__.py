"""What `doctor` makes of the facts: functions of `Facts` alone, which return one check or several."""

from collections.abc import Callable

from ..check import Check
from ..facts import Facts
from .gpus import devices, links, symmetric_memory, visible
from .host import environment, host_memory, limits, shared_memory, temporary_folder
from .software import compiler, packages, python, system, torch, triton

CHECKS: tuple[Callable[[Facts], Check | list[Check]], ...] = (
    system,
    python,
    packages,
    torch,
    triton,
    compiler,
    visible,
    devices,
    links,
    symmetric_memory,
    shared_memory,
    host_memory,
    limits,
    temporary_folder,
    environment,
)


def examine(facts: Facts) -> list[Check]:
    found = []
    for check in CHECKS:
        made = check(facts)
        found += [made] if isinstance(made, Check) else made
    return found
