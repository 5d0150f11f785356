"""Interrupt, progress and refusals: how the workers' side of things reaches ComfyUI's."""

import contextlib
from collections.abc import Callable, Iterator

import comfy.model_management

from ..fastusp_backend.errors import Cancelled, FastUSPError
from ..fastusp_backend.pool import Progress
from .status import show_on_node


class Unsupported(FastUSPError):
    """Something in the workflow that a remote transformer does not do yet."""

    def __init__(self, what: str):
        super().__init__(
            f"{what}: a model of USP Loader does not support this yet. Take that node out of the path between USP "
            f"Loader "
            "and the sampler, or load the model with Load Diffusion Model"
        )


def progress(step: Callable | None = None) -> Progress:
    """Progress that listens to ComfyUI's interrupt and shows phases on the running node. step: see `Progress`."""
    hooks = {"step": step} if step is not None else {}
    return Progress(
        interrupted=comfy.model_management.processing_interrupted,
        phase=lambda text: show_on_node(f"FastUSP: {text}"),
        **hooks,
    )


@contextlib.contextmanager
def following() -> Iterator[None]:
    """Turns a cancelled request into ComfyUI's own interruption."""
    try:
        yield
    except Cancelled:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise
