"""The pools of this ComfyUI: one per device list, kept warm between prompts, closed when ComfyUI ends."""

import threading

from ..fastusp_backend.devices import Devices
from ..fastusp_backend.pool import Pool

_pools: dict[Devices, Pool] = {}
_lock = threading.Lock()


def pool_for(devices: Devices) -> Pool:
    """The pool on `devices`; it starts its processes itself, when it is told to or first used."""
    with _lock:
        if devices not in _pools:
            _pools[devices] = Pool(devices)
        return _pools[devices]


def all_pools() -> list[Pool]:
    with _lock:
        return list(_pools.values())
