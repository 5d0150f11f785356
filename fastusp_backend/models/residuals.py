"""What happens to the image's tokens between a model's blocks beside its own computing: a ControlNet's residuals, and
blocks that are left out.

Shapes: B batch, n tokens.
"""

from typing import NamedTuple

import torch


class Residuals(NamedTuple):
    """What a ControlNet adds to the image stream, and what Skip Layer Guidance leaves out.

    tensors: (B or 1, n, hidden), each for the stream's first n tokens.
    input: block by block, the index of what is added after it, or None; may be shorter or longer than the model's
        blocks.
    output: the same of FLUX's single blocks, and of Stable Diffusion 3's.
    skipped: the numbers of blocks that are left out; what is added after them is added all the same.
    """

    tensors: tuple[torch.Tensor, ...] = ()
    input: tuple[int | None, ...] = ()
    output: tuple[int | None, ...] = ()
    skipped: tuple[int, ...] = ()

    def after_input(self, block: int) -> torch.Tensor | None:
        return self._at(self.input, block)

    def after_output(self, block: int) -> torch.Tensor | None:
        return self._at(self.output, block)

    def _at(self, places: tuple[int | None, ...], block: int) -> torch.Tensor | None:
        place = places[block] if block < len(places) else None
        return None if place is None else self.tensors[place]

    def of_images(self, images: slice) -> "Residuals":
        """The residuals of some images of the batch."""
        return self._replace(tensors=tuple(t if len(t) == 1 else t[images] for t in self.tensors))


NO_RESIDUALS = Residuals()
