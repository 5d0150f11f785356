"""The gather of the image between ranks that reach each other's memory; see peers.py for the order."""

import torch

from .arena import Arena, Part, carve
from .links import Pending

_CHANNEL = 0
"""Of its arena's signals, which are this gather's alone."""


class PeerGather:
    """See `Gather`. For x of one shape."""

    def __init__(self, arena: Arena, shape: tuple[int, ...], dtype: torch.dtype):
        self._arena = arena
        (self._all,) = carve(arena, [((arena.size, *shape), dtype)])

    def all_gather(self, x: torch.Tensor) -> Pending:
        arena, x = self._arena, x.contiguous()
        others = [(arena.position + i) % arena.size for i in range(1, arena.size)]
        mine = Part(self._all, (arena.position,))
        with arena.side_stream():
            for other in others:
                mine.of(other).copy_(x, non_blocking=True)
            arena.put_signals(others, _CHANNEL)
            mine.own.copy_(x)
        for other in others:
            arena.expect(other, _CHANNEL, [Part(self._all, (other,))])

        def wait() -> torch.Tensor:
            arena.wait_all()
            x.numel()  # `x` lives in this closure: its memory must not be reused while it travels
            return self._all.own

        return wait
