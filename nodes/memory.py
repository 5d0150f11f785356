"""The workers' weights in ComfyUI's memory management.

Where a worker computes on the GPU that ComfyUI uses, ComfyUI is told the true size of a remote model: loading it makes
ComfyUI's other models leave, and models that need the room later make it leave. On other devices it has no size.
`Unload Models` (POST /free) reaches every pool. ComfyUI calls all of this where nothing catches an error, its
prompt thread among others: workers that die over it are reported in its log, and the next prompt starts new ones.
"""

import functools
import logging
from collections.abc import Callable

import torch

from ..fastusp_backend.devices import uses_gpu
from ..fastusp_backend.errors import FastUSPError
from ..fastusp_backend.pool import Pool, Session
from .comfyui import model_management
from .pools import all_pools

log = logging.getLogger(__name__)


def shares_gpu(session: Session, device: torch.device) -> bool:
    """Whether a worker computes on ComfyUI's `device`."""
    return device.type == "cuda" and uses_gpu(session.pool.devices, _uuid(device))


@functools.cache
def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


class RemoteWeights:
    """The weights of all pools, as ComfyUI's memory management has to do with them."""

    def __init__(self):
        self._patchers: dict[Pool, object] = {}
        """Pool -> the patcher whose weights it got last. ComfyUI forgets the patchers that nobody refers to; the
        weights in the workers stay, and so must what stands for them."""
        self._stayed: set[Pool] = set()
        """Pools whose weights did not leave when ComfyUI wanted their room, since a request ran; it has taken them off
        its list."""
        self._unloading_all = False

    def make_room(self, session: Session, device: torch.device, patcher: object) -> None:
        """Before `session` samples: what ComfyUI's models left on `device`, and other pools have on the same GPUs,
        goes."""
        self._patchers[session.pool] = patcher
        if session.resident_bytes():
            return
        for pool, other in list(self._patchers.items()):
            if pool is not session.pool and set(pool.devices.gpus) & set(session.pool.devices.gpus):
                _logged_failure(other.session.make_room)
        if shares_gpu(session, device):
            model_management.soft_empty_cache()

    def evict(self, session: Session) -> int:
        """ComfyUI needs the room of `session`'s weights; returns the bytes that each device got back."""
        resident = session.resident_bytes()
        # A preview wants room in the middle of a loop. Between two evaluations of a sampler that steps from ComfyUI
        # they leave, as ComfyUI's own would for a ControlNet's VAE; the next evaluation fetches them.
        if resident and session.pool.busy:
            self._stayed.add(session.pool)
            return 0
        if not resident or self._unloading_all:
            return 0
        _logged_failure(session.make_room)
        return resident - session.resident_bytes()

    def after_run(self, session: Session, patcher: object) -> None:
        """A sampling run of `session` has ended. ComfyUI lists what stayed although it was told to leave as a loaded
        model again: `patcher`."""
        _logged_failure(session.after_run)
        if session.pool in self._stayed:
            self._stayed.discard(session.pool)
            if session.resident_bytes():
                model_management.load_models_gpu([patcher])

    def follow_unload_all(self) -> None:
        """Has ComfyUI's `unload_all_models` drop the weights of all pools. A patcher is told only that it must leave,
        which it also is when another model needs room on a device where its workers have nothing."""
        unload = model_management.unload_all_models

        @functools.wraps(unload)
        def unload_all_models(*args, **kwargs):
            self._unloading_all = True
            try:
                result = unload(*args, **kwargs)
            finally:
                self._unloading_all = False
            for pool in all_pools():
                if not pool.busy:
                    _logged_failure(pool.release)
            self._patchers.clear()
            return result

        model_management.unload_all_models = unload_all_models


weights = RemoteWeights()
"""ComfyUI has one memory management."""


def _logged_failure(order: Callable[[], None]) -> None:
    """Has workers make room. Those that die over it have made it."""
    try:
        order()
    except FastUSPError as error:
        log.warning("%s", error)
