"""Which tokens of the joint sequence [text, image] a rank holds, and which gathered tokens are real.

Each stream is cut into equal local lengths, padded only as far as that needs: text in front of its first token, image
behind its last. A rank holds [its text, its image], so in the common case all padding of the gathered sequence lies
at its two ends and one slice removes it. Padded tokens are computed (they are finite) but never attended and never
returned: attention is exact at any length.
"""

from dataclasses import dataclass

import torch

from ..config import Layout


@dataclass(frozen=True, slots=True)
class SequenceShards:
    """text, image: token counts of the whole streams."""

    layout: Layout
    text: int
    image: int

    @property
    def local_text(self) -> int:
        return -(-self.text // self.layout.ranks)

    @property
    def local_image(self) -> int:
        return -(-self.image // self.layout.ranks)

    @property
    def local(self) -> int:
        return self.local_text + self.local_image

    @property
    def _text_padding(self) -> int:
        return self.local_text * self.layout.ranks - self.text

    def take_text(self, x: torch.Tensor, rank: int, *, dim: int) -> torch.Tensor:
        """Rank `rank`'s part of a text stream, zeros where it is padded."""
        return _take(x, dim, rank * self.local_text - self._text_padding, self.local_text)

    def take_image(self, x: torch.Tensor, rank: int, *, dim: int) -> torch.Tensor:
        """Rank `rank`'s part of an image stream, zeros where it is padded."""
        return _take(x, dim, rank * self.local_image, self.local_image)

    def join_image(self, parts: torch.Tensor) -> torch.Tensor:
        """parts (P, B, local_image, ...), in rank order -> (B, image, ...)."""
        whole = parts.transpose(0, 1).flatten(1, 2)
        return whole[:, : self.image]

    def valid_runs(self, ring_position: int) -> list[tuple[int, int]]:
        """The real tokens, as [start, stop) runs, of what the Ulysses group at `ring_position` gathers.

        The gathered sequence is the ranks' [text, image] one behind the other: ulysses x (local_text + local_image).
        """
        runs: list[tuple[int, int]] = []
        for i in range(self.layout.ulysses):
            rank = ring_position * self.layout.ulysses + i
            base = i * self.local
            text_start = min(self.local_text, max(0, self._text_padding - rank * self.local_text))
            image_stop = min(self.local_image, max(0, self.image - rank * self.local_image))
            for start, stop in (
                (base + text_start, base + self.local_text),
                (base + self.local_text, base + self.local_text + image_stop),
            ):
                if start == stop:
                    continue
                if runs and runs[-1][1] == start:
                    runs[-1] = (runs[-1][0], stop)
                else:
                    runs.append((start, stop))
        return runs


def select_runs(x: torch.Tensor, runs: list[tuple[int, int]], *, dim: int) -> torch.Tensor:
    """Keeps the tokens in `runs` along `dim`: a view where they are one run, a copy else."""
    if len(runs) == 1:
        start, stop = runs[0]
        return x.narrow(dim, start, stop - start)
    if not runs:
        return x.narrow(dim, 0, 0)
    return torch.cat([x.narrow(dim, start, stop - start) for start, stop in runs], dim)


def _take(x: torch.Tensor, dim: int, start: int, length: int) -> torch.Tensor:
    """x[start : start + length] along `dim`, with zeros where that reaches outside x."""
    size = x.shape[dim]
    first, last = min(max(start, 0), size), min(max(start + length, 0), size)
    part = x.narrow(dim, first, last - first)
    if last - first == length:
        return part
    before = x.new_zeros(*x.shape[:dim], min(length, max(0, first - start)), *x.shape[dim + 1 :])
    after_length = length - before.shape[dim] - part.shape[dim]
    after = x.new_zeros(*x.shape[:dim], after_length, *x.shape[dim + 1 :])
    return torch.cat([before, part, after], dim)
