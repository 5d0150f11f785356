"""The pools of this ComfyUI: one per device list, kept warm between prompts, closed when ComfyUI ends."""

import threading
from collections.abc import Callable

from ..fastusp_backend.devices import Devices
from ..fastusp_backend.pool import Pool

_pools: dict[Devices, Pool] = {}
_lock = threading.Lock()
_listeners: list[Callable[[], None]] = []


def pool_for(devices: Devices) -> Pool:
    """The pool on `devices`; it starts its processes itself, when it is told to or first used. One of a server that has
    other devices now goes."""
    with _lock:
        for other in [x for x in _pools if str(x) == str(devices) and x != devices]:
            _pools.pop(other).close()
        if devices not in _pools:
            _pools[devices] = pool = Pool(devices)
            pool.changed = _tell
        return _pools[devices]


def all_pools() -> list[Pool]:
    with _lock:
        return list(_pools.values())


def pool_named(devices: object) -> Pool | None:
    """The pool on devices of that name, as `Pool.status` tells it."""
    return next((pool for pool in all_pools() if str(pool.devices) == devices), None)


def on_change(listener: Callable[[], None]) -> None:
    """listener is called, on some thread, when a pool's processes are ready, and when they have ended."""
    _listeners.append(listener)


def _tell() -> None:
    for listener in _listeners:
        listener()
