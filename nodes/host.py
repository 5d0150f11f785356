"""Interrupt, progress and refusals: how the workers' side of things reaches ComfyUI's."""

import contextlib
from collections.abc import Callable, Iterator

from ..fastusp_backend.errors import Cancelled, FastUSPError
from ..fastusp_backend.pool import Progress
from .comfyui import model_management
from .status import node_status, push_pools

STOPPED = Cancelled, model_management.InterruptProcessingException
"""How a run ends that is stopped. In ComfyUI 0.3.64 the second is an Exception as others are."""


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


def progress(step: Callable | None = None, **more: Callable) -> Progress:
    """Progress that listens to ComfyUI's interrupt, shows phases on the running node and tells the page how far a run
    is. step and more: see `Progress`."""

    def phase(text: str) -> None:
        node_status().phase(text)
        push_pools()

    def stepped(event, tensors) -> None:
        if step is not None:
            step(event, tensors)
        push_pools(now=event.index + 1 == event.total)

    return Progress(interrupted=model_management.processing_interrupted, phase=phase, step=stepped, **more)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turns a cancelled request into ComfyUI's own interruption."""
    try:
        yield
    except Cancelled:
        model_management.throw_exception_if_processing_interrupted()
        raise
