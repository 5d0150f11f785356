"""The workers' weights in ComfyUI's memory management.

Where a worker computes on the GPU that ComfyUI uses, ComfyUI is told the true size of a remote model: loading it makes
ComfyUI's other models leave, and models that need the room later make it leave. On other devices it has no size.
`Unload Models` (POST /free) reaches every pool.
"""

import functools

import torch

from ..fastusp_backend.devices import holds_gpu
from ..fastusp_backend.pool import Pool, Session
from .comfyui import model_management
from .pools import all_pools

_known: dict[Pool, object] = {}
"""By pool, the patcher whose weights it got last. ComfyUI forgets the patchers that nobody refers to; the weights in
the workers stay, and so must what stands for them."""

_unloading_all = False


def shares_gpu(session: Session, device: torch.device) -> bool:
    """Whether a worker computes on ComfyUI's `device`."""
    return device.type == "cuda" and holds_gpu(session.pool.devices, _uuid(device))


@functools.cache
def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def taking(session: Session, device: torch.device, patcher: object) -> None:
    """Before `session` samples: what ComfyUI's models left on `device`, and other pools hold on the same GPUs, goes."""
    _known[session.pool] = patcher
    if session.holds():
        return
    for pool, other in list(_known.items()):
        if pool is not session.pool and set(pool.devices.gpus) & set(session.pool.devices.gpus):
            other.session.give_way()
    if shares_gpu(session, device):
        model_management.soft_empty_cache()


def leaving(session: Session) -> int:
    """ComfyUI needs the room of `session`'s weights; returns the bytes that each device got back."""
    held = session.holds()
    # Busy: a preview wants room in the middle of a run.
    if not held or session.pool.busy or _unloading_all:
        return 0
    session.give_way()
    return held


def follow_unload_all() -> None:
    """Has ComfyUI's `unload_all_models` drop the weights of all pools. A patcher is told only that it must leave, which
    it also is when another model needs room on a device where its workers hold nothing."""
    unload = model_management.unload_all_models

    @functools.wraps(unload)
    def unload_all_models(*args, **kwargs):
        global _unloading_all
        _unloading_all = True
        try:
            result = unload(*args, **kwargs)
        finally:
            _unloading_all = False
        for pool in all_pools():
            if not pool.busy:
                pool.release()
        _known.clear()
        return result

    model_management.unload_all_models = unload_all_models
