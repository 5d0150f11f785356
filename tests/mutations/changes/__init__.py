"""The list, by rooms. It has those that once went unnoticed."""

from ..change import Change
from . import (
    attention,
    command_line,
    communication,
    engine,
    host,
    kernels,
    machine,
    models,
    pool,
    processes,
    sampling,
    serving,
    weights,
)

ROOMS = (
    communication,
    attention,
    kernels,
    sampling,
    models,
    engine,
    weights,
    processes,
    pool,
    machine,
    serving,
    command_line,
    host,
)
CHANGES: list[Change] = [
    Change(file, what, old, new, tuple(f"tests/{test}" for test in tests.split()))
    for room in ROOMS
    for file, what, old, new, tests in room.CHANGES
]
