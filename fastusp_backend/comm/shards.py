"""Which tokens of the joint sequence [text, image] a rank has, and where gathered tokens lie.

Each stream is cut into equal local lengths, padded only as far as that needs: text in front of its first token, image
behind its last. A rank has [its text, its image]; a Ulysses group gathers [all its text, all its image], so
padding lies at the two ends of the gathered sequence and one slice removes it. Padded tokens are computed (they are
finite) but never attended and never returned: attention is exact at any length.
"""

from dataclasses import dataclass

import torch

from ..config import Layout


@dataclass(frozen=True, slots=True)
class SequenceShards:
    """The cut of one sequence under a layout. text, image: tokens of the whole streams."""

    layout: Layout
    text: int
    image: int

    @property
    def local_text(self) -> int:
        """Text tokens of each rank, padding included: Lt."""
        return -(-self.text // self.layout.sequence_ranks)

    @property
    def local_image(self) -> int:
        """Image tokens of each rank, padding included: Li."""
        return -(-self.image // self.layout.sequence_ranks)

    @property
    def local(self) -> int:
        """Tokens of each rank, padding included: L."""
        return self.local_text + self.local_image

    @property
    def gathered(self) -> int:
        """Tokens, padding included, that a Ulysses group gathers: N."""
        return self.layout.ulysses * self.local

    @property
    def _text_padding(self) -> int:
        return self.local_text * self.layout.sequence_ranks - self.text

    def take_text(self, x: torch.Tensor, sequence_position: int, *, dim: int) -> torch.Tensor:
        """Returns a rank's part of a text stream, zeros where it is padded."""
        return _take(x, dim, sequence_position * self.local_text - self._text_padding, self.local_text)

    def take_image(self, x: torch.Tensor, sequence_position: int, *, dim: int) -> torch.Tensor:
        """Returns a rank's part of an image stream, zeros where it is padded."""
        return _take(x, dim, sequence_position * self.local_image, self.local_image)

    def unpadded_image(self, x: torch.Tensor, sequence_position: int, *, dim: int) -> torch.Tensor:
        """Returns a rank's part of an image stream, or of its beginning, without padding: a view of x."""
        return _within(x, dim, sequence_position * self.local_image, self.local_image)

    def join_image(self, parts: torch.Tensor) -> torch.Tensor:
        """Joins parts (P, B, Li, ...), in the order of sequence positions, to (B, image, ...)."""
        whole = parts.transpose(0, 1).flatten(1, 2)
        return whole[:, : self.image]

    def regions(self, ulysses_position: int, *, text: bool = True, image: bool = True) -> list[tuple[slice, slice]]:
        """Returns per stream where a rank's tokens lie: (its local rows, their rows in what its Ulysses group
        gathers)."""
        u, t, i = self.layout.ulysses, self.local_text, self.local_image
        found = []
        if text:
            found.append((slice(0, t), slice(ulysses_position * t, (ulysses_position + 1) * t)))
        if image:
            start = u * t + ulysses_position * i
            found.append((slice(t, t + i), slice(start, start + i)))
        return found

    def valid(self, ring_position: int, *, text: bool = True) -> slice:
        """Returns the rows without padding of what the Ulysses group at `ring_position` gathers, or those of the image
        alone; they may be none."""
        u = self.layout.ulysses
        first = ring_position * u  # the group's first sequence position
        text_start = min(u * self.local_text, max(0, self._text_padding - first * self.local_text))
        image_count = min(u * self.local_image, max(0, self.image - first * self.local_image))
        return slice(text_start if text else u * self.local_text, u * self.local_text + image_count)


def _take(x: torch.Tensor, dim: int, start: int, length: int) -> torch.Tensor:
    """Returns x[start : start + length] along `dim`, with zeros where that reaches outside x."""
    part = _within(x, dim, start, length)
    if part.shape[dim] == length:
        return part
    first = min(max(start, 0), x.shape[dim])
    before = x.new_zeros(*x.shape[:dim], min(length, max(0, first - start)), *x.shape[dim + 1 :])
    after_length = length - before.shape[dim] - part.shape[dim]
    after = x.new_zeros(*x.shape[:dim], after_length, *x.shape[dim + 1 :])
    return torch.cat([before, part, after], dim)


def _within(x: torch.Tensor, dim: int, start: int, length: int) -> torch.Tensor:
    """Returns what there is of x[start : start + length] along `dim`."""
    size = x.shape[dim]
    first, last = min(max(start, 0), size), min(max(start + length, 0), size)
    return x.narrow(dim, first, last - first)
