"""What moves tensors between the ranks of a sequence, as the rest sees it: Ulysses' exchanges, the ring, the gather.

Each has two implementations, over a process group's collectives (collective.py) and over memory that ranks share
(peers.py); transport.py chooses. All of them start early and are awaited late, so that a schedule can put work between.

Forward, Ulysses sends a rank's q, k and v of the heads that Ulysses position u attends to u; what arrives lies in the
gathered sequence that attention reads. Back, the attended tokens return to their owners.

attention/__init__.py lists the letters of the shapes.
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


class Ulysses(Protocol):
    """The exchanges before and after attention, for q, k and v of one shape.

    position: this rank's Ulysses position.
    received (3, B, N, h, D): q, k, v of the gathered sequence, this rank's own part written by the caller.
    outgoing (3, U, B, L, *row): what is sent, by Ulysses position, as rows of the wire (see wire.py), written by the
        caller before `send`, unless `peers_memory` says where it goes instead; the own slot is unused.
    in_turn: whether v, k and q had better be projected one after the other even where what follows leaves them time to
        travel.
    own_last: whether this rank's image tokens may be attended last, while the others' travel, and that pays. Not for
        what goes round a ring as well.
    """

    position: int
    in_turn: bool
    own_last: bool
    received: torch.Tensor
    outgoing: torch.Tensor

    def peers_memory(self, which: slice, *, text: bool = True, image: bool = True) -> torch.Tensor | None:
        """Returns the addresses (U,) int64 of all ranks' `received`, by Ulysses position, where the caller itself
        writes what is sent next, rather than to `outgoing`; None where it does not."""

    def send(self, which: slice, *, text: bool = True, image: bool = True) -> None:
        """Starts sending outgoing[which], its text rows, image rows or both."""

    def wait(self) -> None:
        """Orders what follows behind the arrival of all that was sent to this rank."""

    def give_back(self, attended: torch.Tensor, *, text_first: bool = False, own_later: bool = False) -> None:
        """Starts returning attended (B, N, h, D) tokens to their owners. text_first: the text's in a message of their
        own. own_later, where `own_last`: this rank's image tokens are not there yet; the caller writes them to
        `attended`, which is contiguous, and calls `keep`."""

    def keep(self) -> None:
        """Takes this rank's image tokens, which were not there when `give_back` was called."""

    def take_text(self) -> torch.Tensor:
        """Waits for the attended text tokens of this rank, where they came first, and returns (B, L, H D), in which the
        image's may still be missing; `take_back` follows."""

    def take_back(self) -> torch.Tensor:
        """Waits for the attended tokens of this rank, all heads, and returns them (B, L, H D)."""


class Ring(Protocol):
    """keys_first: whether keys and values had better be projected ahead of queries even where what follows leaves them
    time to travel."""

    keys_first: bool

    def start(self, own: torch.Tensor) -> None:
        """Starts passing this rank's keys and values on, which stay as they are until the `rotate` that follows is
        exhausted."""

    def rotate(self, own: torch.Tensor, *, pipelined: bool) -> Iterator[Block]:
        """Yields all ring positions' blocks, this rank's `own` keys and values (2, B, N, h, D) first, and starts unless
        `start` has. A block is valid until the next is asked for; the iterator must be exhausted. pipelined: the next
        block travels while the caller works with one."""


class Gather(Protocol):
    def all_gather(self, x: torch.Tensor) -> Pending:
        """Gathers x (...) to (P, ...), every rank's x in the order of positions."""


@dataclass(frozen=True, slots=True)
class Links:
    """What moves the tensors of one shape; None where the axis has one rank."""

    ulysses: Ulysses
    ring: Ring | None
    gather: Gather | None


class LocalUlysses:
    """See `Ulysses`. For one rank, where nothing moves: the caller writes all of `received` (3, B, N, H, D)."""

    position, in_turn, own_last = 0, False, False

    def __init__(self, received: torch.Tensor):
        self.received = received
        self.outgoing = received.new_empty(3, 0, *received.shape[1:])
        self._attended: torch.Tensor | None = None

    def peers_memory(self, which: slice, *, text: bool = True, image: bool = True) -> None:
        return None

    def send(self, which: slice, *, text: bool = True, image: bool = True) -> None:
        pass

    def wait(self) -> None:
        pass

    def give_back(self, attended: torch.Tensor, *, text_first: bool = False, own_later: bool = False) -> None:
        self._attended = attended

    def keep(self) -> None:
        pass

    def take_back(self) -> torch.Tensor:
        return self._attended.flatten(2)

    take_text = take_back
