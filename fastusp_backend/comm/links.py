"""What moves tensors between the ranks of a sequence, as the rest sees it: Ulysses' exchanges, the ring, the gather.

Each has two implementations, over a process group's collectives (collective.py) and over memory that ranks share
(peers.py); transport.py chooses. All of them start early and are awaited late, so that a schedule can put work between.

Forward, Ulysses sends a rank's q, k and v of the heads that Ulysses position u attends to u; what arrives lies in the
gathered sequence that attention reads. Back, the attended tokens return to their owners.

U Ulysses ranks, B batch, L local tokens [text, image], N = U L gathered tokens, H heads, h = H / U, D head dim.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

Q, K, V = range(3)

Pending = Callable[[], torch.Tensor]
"""An exchange under way; calling it once waits and returns what arrived."""

Block = tuple[int, torch.Tensor]
"""A ring position and its keys and values (2, B, N, h, D)."""


class UlyssesExchange(Protocol):
    """received (3, B, N, h, D): q, k, v of the gathered sequence, this rank's own part written by the caller.
    outgoing (3, U, B, L, *row), rows of the wire (see wire.py): payloads by destination, written by the caller
    before `send`; slot `position` is unused.
    """

    position: int
    received: torch.Tensor
    outgoing: torch.Tensor

    def send(self, which: slice, *, text: bool = True, image: bool = True) -> None:
        """Starts sending outgoing[which], its text rows, image rows or both."""

    def wait(self) -> None:
        """Orders what follows behind the arrival of all that was sent to this rank."""

    def give_back(self, attended: torch.Tensor) -> None:
        """Starts returning attended (B, N, h, D) tokens to their owners."""

    def take_back(self) -> torch.Tensor:
        """The attended tokens of this rank, all heads: (B, L, H D)."""


class Ring(Protocol):
    def rotate(self, own: torch.Tensor, *, pipelined: bool) -> Iterator[Block]:
        """own (2, B, N, h, D), this rank's keys and values -> all positions' blocks, the own one first. A block is
        valid until the next is asked for; the iterator must be exhausted. pipelined: the next one travels
        meanwhile."""


class Gather(Protocol):
    def all_gather(self, x: torch.Tensor) -> Pending:
        """x (...) -> (P, ...), every rank's x in the order of positions."""


@dataclass(frozen=True, slots=True)
class Links:
    """What moves the tensors of one shape; None where an axis has one rank."""

    exchange: UlyssesExchange
    ring: Ring | None
    gather: Gather | None


class LocalExchange:
    """One rank: nothing moves, the caller writes into `received` (3, B, N, H, D) itself."""

    position = 0

    def __init__(self, received: torch.Tensor):
        self.received = received
        self.outgoing = received.new_empty(3, 0, *received.shape[1:])
        self._attended: torch.Tensor | None = None

    def send(self, which: slice, *, text: bool = True, image: bool = True) -> None:
        pass

    def wait(self) -> None:
        pass

    def give_back(self, attended: torch.Tensor) -> None:
        self._attended = attended

    def take_back(self) -> torch.Tensor:
        return self._attended.flatten(2)
