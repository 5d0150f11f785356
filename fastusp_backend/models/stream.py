"""What a transformer knows of weights that do not stay on its device."""

from typing import Protocol


class Stream(Protocol):
    """Where the weights of some blocks come from while the model is evaluated: see engine/block_stream.py."""

    def prime(self, tokens: bool) -> None:
        """Has the weights of the first of them on the device. Ahead of an evaluation, not within a graph. tokens:
        whether ranks exchange any in it."""

    def begin(self, block: int) -> None:
        """Has the weights of block number `block` on the device, if it is one of them."""

    def tokens_arrived(self) -> None:
        """Says that a block's tokens have come from the other ranks, and it attends: weights may travel."""

    def tokens_returned(self) -> None:
        """Says that its attended tokens are back."""

    def end(self) -> None:
        """Ends an evaluation."""
