"""Interrupt, progress and refusals: how the workers' side of things reaches ComfyUI's."""

import contextlib
from collections.abc import Callable, Iterator

from ..fastusp_backend.errors import Cancelled, FastUSPError
from ..fastusp_backend.pool import Progress
from .comfyui import model_management
from .status import node_status


class Unsupported(FastUSPError):
    """Raised where a node wants of a remote transformer what it does not do yet.

    what: names the node's feature.
    instead: what gives the same in another way, where there is one.
    """

    def __init__(self, what: str, instead: str = ""):
        instead = instead or (
            "Remove that node from the path between USP Loader and the sampler, or load the model with Load Diffusion "
            "Model"
        )
        super().__init__(f"{what}: USP Loader does not support this yet. {instead}")


def progress(step: Callable | None = None) -> Progress:
    """Progress that listens to ComfyUI's interrupt and shows phases on the running node. step: see `Progress`."""
    hooks = {"step": step} if step is not None else {}
    return Progress(
        interrupted=model_management.processing_interrupted, phase=lambda text: node_status().phase(text), **hooks
    )


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turns a cancelled request into ComfyUI's own interruption."""
    try:
        yield
    except Cancelled:
        model_management.throw_exception_if_processing_interrupted()
        raise
