"""Unified sequence parallelism (Ulysses x ring, arXiv 2405.07719) as steps that a model's schedule places.

Ulysses trades tokens for heads: before attention an exchange gives each rank of a Ulysses group all of the group's
tokens for its own heads, after it another gives the tokens back. Between them the ring passes keys and values round,
so that every token sees all others; the partial results are merged by their LSE (arXiv 2310.01889).

Of L tokens with C values a rank sends 4 L C (U - 1) / U values a layer to its Ulysses group and 2 L C (ring - 1) along
the ring: Ulysses scales better, but its ranks must divide the heads; the ring divides any number of tokens.
"""

from collections.abc import Callable

import torch

from ..comm.links import K, Links, Q, V
from ..comm.mesh import Mesh
from ..comm.shards import SequenceShards
from ..kernels.merge import merge
from ..kernels.place import EPS, place
from ..pulse import beat
from .local import Attend

ALL = slice(Q, V + 1)
ONLY_Q, ONLY_K, ONLY_V = slice(Q, Q + 1), slice(K, K + 1), slice(V, V + 1)
IN_TURN = ONLY_V, ONLY_K, ONLY_Q
"""The order in which each had better travel while the next is computed."""
KEYS_AND_VALUES = slice(K, V + 1)

Rope = tuple[torch.Tensor, torch.Tensor]


class JointAttention:
    """Attention over the whole sequence for one rank's tokens, for tensors of one shape.

    A layer calls `project` once or more (in the same order on all ranks), then `attend`, then `collect`; or
    `attend(text_first=True)`, `collect_text` and `collect_image`. One in which the image's tokens attend to each other
    alone projects those and calls `attend(image_only=True)` and `collect_image`.

    overlap: exchanges run while the layer computes what lies between these calls; else each is awaited where it starts.
    pipelined: the ring's next block travels while the current one is attended.
    arrived, returned: called as a layer attends and when its tokens are back: nothing of Ulysses travels then, but what
        is given back while a rank attends its own image tokens.
    eps: epsilon of the norms of queries and keys.

    parts: of q, k and v, in the order in which a layer projects them that leaves them time to travel: all at once, or
        one after the other where they travel long.
    """

    def __init__(
        self,
        mesh: Mesh,
        attend: Attend,
        shards: SequenceShards,
        links: Links,
        *,
        overlap: bool,
        pipelined: bool,
        arrived: Callable[[], None] = lambda: None,
        returned: Callable[[], None] = lambda: None,
        eps: float = EPS,
    ):
        self._attend, self._shards, self._ulysses, self._ring = attend, shards, links.ulysses, links.ring
        self._overlap, self._pipelined = overlap, pipelined
        self._tokens_arrived, self._tokens_returned, self._eps = arrived, returned, eps
        self._returned: torch.Tensor | None = None
        self._own_regions = shards.regions(self._ulysses.position)
        positions = range(mesh.layout.ring)
        self._valid = [shards.valid(position) for position in positions]
        self._text_rows = mesh.layout.ulysses * shards.local_text
        self._valid_image = [shards.valid(position, text=False) for position in positions]
        self._scale = self._ulysses.received.shape[-1] ** -0.5
        # With Ulysses, what the ring passes on is not there before tokens have arrived.
        self._ring_early = self._ring is not None and overlap and pipelined and mesh.layout.ulysses == 1
        self.parts = (ALL,)
        if overlap and self._ulysses.in_turn:
            self.parts = IN_TURN
        elif self._ring_early and self._ring.keys_first:
            self.parts = KEYS_AND_VALUES, ONLY_Q
        self._projected: set[tuple[int, str]] = set()  # keys and values that the ring may take

    def project(
        self,
        projected: torch.Tensor,
        scales: tuple[torch.Tensor | None, ...],
        rope: Rope | None,
        which: slice = ALL,
        *,
        text: bool = True,
        image: bool = True,
    ) -> None:
        """Norms, rotates and starts sending T tensors of this rank's text rows, image rows or both.

        projected (B, R, T C): the tensors `which` of q, k, v.
        scales: their norms' weights (D,), None for what is neither normed nor rotated, as v.
        rope: cos, sin of these rows, (R, D / 2), None for no rotation.
        """
        first_row = 0 if text else self._shards.local_text
        ulysses = self._ulysses
        beat()
        place(
            projected,
            scales,
            rope,
            which,
            first_row,
            ulysses.received,
            ulysses.outgoing,
            ulysses.position,
            self._own_regions,
            self._eps,
            ulysses.peers_memory(which, text=text, image=image),
        )
        self._ulysses.send(which, text=text, image=image)
        if not self._overlap:
            self._ulysses.wait()
        if self._ring_early:
            self._start_ring({K, V}.intersection(range(which.start, which.stop)), text, image)

    def _start_ring(self, tensors: set[int], text: bool, image: bool) -> None:
        """Has keys and values travel as soon as they are complete: what a layer computes until it attends hides it."""
        before = len(self._projected)
        self._projected |= {(tensor, rows) for tensor in tensors for rows in ("text",) * text + ("image",) * image}
        if before < len(self._projected) == 4:
            self._ring.start(self._ulysses.received[KEYS_AND_VALUES])

    def attend(self, *, text_first: bool = False, image_only: bool = False) -> None:
        """Waits for what was projected, attends, and starts returning the tokens to their owners.

        text_first: the text's, so that a layer computes with them while the image's travel.
        image_only: to the image's tokens. The text's queries do so as well, as zeros, and nobody takes what comes of
            it: one call over neighbouring rows costs less than to cut the few of the text out. (They are of the layer
            before, or of nothing: what is no number there would be in the scale of a head in 8 bits.)
        """
        self._ulysses.wait()
        self._projected.clear()
        self._tokens_arrived()
        q, k, v = self._ulysses.received.unbind(0)
        valid = self._valid_image if image_only else self._valid
        if image_only:
            q[:, : self._text_rows] = 0
        if self._overlap and not self._ring and self._ulysses.own_last:
            self._attend_own_last(q, k[:, valid[0]], v[:, valid[0]], text_first)
            return
        if self._ring:
            attended = self._over_ring(q, self._ulysses.received[KEYS_AND_VALUES], valid)
        else:
            attended = self._attend(q, k[:, valid[0]], v[:, valid[0]], self._scale)[0]
        self._ulysses.give_back(attended, text_first=text_first)
        if not self._overlap:
            self._returned = self._ulysses.take_back()

    def _attend_own_last(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text_first: bool) -> None:
        """Attends the other's tokens and all text, and while these travel this rank's part of the image."""
        _, (_, own) = self._own_regions
        before, behind = q[:, : own.start], q[:, own.stop :]
        # In one call, since few tokens do not fill a GPU.
        out = self._attend(torch.cat([before, behind], 1) if behind.shape[1] else before, k, v, self._scale)[0]
        attended = q.new_empty(q.shape)
        attended[:, : own.start], attended[:, own.stop :] = out[:, : own.start], out[:, own.start :]
        self._ulysses.give_back(attended, text_first=text_first, own_later=True)
        attended[:, own] = self._attend(q[:, own], k, v, self._scale)[0]
        self._ulysses.keep()

    def collect(self) -> torch.Tensor:
        """Returns the attended tokens of this rank (B, L, C), text first, valid until the next `attend`."""
        attended = self._ulysses.take_back() if self._overlap else self._returned
        self._tokens_returned()
        return attended

    def collect_text(self) -> torch.Tensor:
        """Returns the attended text tokens of this rank (B, Lt, C)."""
        attended = self._ulysses.take_text() if self._overlap else self._returned
        return attended[:, : self._shards.local_text]

    def collect_image(self) -> torch.Tensor:
        """Returns the attended image tokens of this rank (B, Li, C), behind `collect_text` where there is text."""
        return self.collect()[:, self._shards.local_text :]

    def _over_ring(self, q: torch.Tensor, own: torch.Tensor, valid_of: list[slice]) -> torch.Tensor:
        """Attends q (B, N, h, D) over the valid ones of all ring positions' keys and values; own (2, B, N, h, D) are
        this one's."""
        merged: tuple[torch.Tensor, torch.Tensor] | None = None
        for position, (k, v) in self._ring.rotate(own, pipelined=self._pipelined):
            valid = valid_of[position]
            if valid.start >= valid.stop:
                continue
            out, lse = self._attend(q, k[:, valid], v[:, valid], self._scale)
            if merged is None:
                merged = out.float().contiguous(), lse.contiguous()
            else:
                merge(*merged, out, lse)
        return merged[0].to(q.dtype)
