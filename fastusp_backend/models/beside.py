"""Work beside the main stream of a GPU: the text's half of a block, while the main stream has the image's.

A text has few rows. Its products are too small to fill a GPU, and its kernels too short to hide each other's starts; on
a stream of its own they run where the image's leave processors idle. It comes first where both have work, since its
half is a long chain of short kernels. For a rank that has all tokens of its prompt: elsewhere tokens travel meanwhile,
which the text's half hides by coming after the image's (on two GPUs a second stream gained nothing then).
"""

import contextlib
import functools
from collections.abc import Iterator

import torch


@functools.cache
def _second(device: torch.device) -> torch.cuda.Stream:
    """One for all: cuBLAS keeps 32 MB for each stream on Hopper."""
    return torch.cuda.Stream(device, priority=-1)


class Beside:
    """A second stream, on GPUs if `active`; else what is given to it is done in turn.

    Memory that one stream's tensors leave is taken again in that stream's order alone. So `run` starts behind all that
    the main stream was given, which has then read what an earlier `run` made, and what the second stream reads is held
    until `join`.
    """

    def __init__(self, device: torch.device, *, active: bool = True):
        self._device, self._read = device, []
        self._stream = _second(device) if active and device.type == "cuda" else None

    @contextlib.contextmanager
    def run(self, *read) -> Iterator[None]:
        """What is launched within runs beside what the main stream is given until `join`. read: all tensors of the main
        stream that it reads but weights and modulations."""
        if self._stream is None:
            yield
            return
        self._read += read
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Has the main stream wait for it."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._read.clear()
