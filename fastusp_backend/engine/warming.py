"""What a GPU's first evaluation would wait for otherwise, 1.5 s of it: cuDNN and cuBLAS load at their first use, and
Triton hashes itself before its first kernel. It is done while the ranks meet and the weights are read."""

import functools
import logging
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..attention import local
from ..kernels import tokens

log = logging.getLogger(__name__)


class Warming:
    """Begins at once, on threads of its own, for a CUDA device. What fails there is logged alone: the first evaluation
    meets it, and reports it."""

    def __init__(self, device: torch.device):
        parts = [functools.partial(_try, part, device) for part in (_attention, _product, _kernel)]
        self._threads = [threading.Thread(target=part, name="warming", daemon=True) for part in parts]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Waits until it has ended."""
        for thread in self._threads:
            thread.join()


def _try(part: Callable[[torch.device], None], device: torch.device) -> None:
    try:
        with torch.cuda.device(device):  # a new thread is on the first one
            part(device)
    except Exception:
        log.info("warming up failed:", exc_info=True)


def _attention(device: torch.device) -> None:
    q = torch.zeros(1, 128, 2, 128, dtype=torch.bfloat16, device=device)
    _, attend = local.choose("auto", device, q.dtype, (2, 128))
    attend(q, q, q, 1.0)


def _product(device: torch.device) -> None:
    x = torch.zeros(128, 128, dtype=torch.bfloat16, device=device)
    F.linear(x, x, x[0])


def _kernel(device: torch.device) -> None:
    if tokens.available(device):
        x = torch.zeros(1, 1, 128, dtype=torch.bfloat16, device=device)
        tokens.norm(x, x, x, fp8=False)
