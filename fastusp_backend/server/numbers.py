"""Numbers that clients give to tensors and patch sets, and those under which the workers have them: two clients may
have given the same."""

import itertools
import threading
from typing import NamedTuple

from msgspec.structs import replace

from ..errors import RequestError
from ..pool.sent import KEPT_TENSORS
from ..prompt import Tensors
from ..protocol import Evaluate, Message, Patch, Sample

MOST_TENSORS = 2 * KEPT_TENSORS
"""Of prompts, that the workers keep for a client: those of `pool.sent`, and as many that it is in doubt about."""
MOST_BYTES = 4 << 30
"""Of these tensors."""


class WorkerNumbers:
    """Those of one set of workers, given once; and the tensors whose client is gone, until they are told to forget
    them."""

    def __init__(self):
        self.tensors, self.patches = itertools.count(), itertools.count(1)
        self.orphans: list[int] = []
        self.lock = threading.Lock()
        """Clients come and go while requests are translated."""


class _Kept(NamedTuple):
    number: int
    nbytes: int


class ClientNumbers:
    """One client's numbers -> the workers'."""

    def __init__(self, workers: WorkerNumbers):
        self._workers = workers
        self._tensors: dict[int, _Kept] = {}
        self._patches: dict[int | None, int | None] = {0: 0, None: None}
        self._left = False

    def translate(self, message: Message, tensors: Tensors, number: int) -> Message:
        """What the workers are sent in place of a client's request, as their request `number`, with the same tensors.

        Raises RequestError for a tensor that the client has not sent, for more than the workers keep, and where the
        client is gone; nothing has changed then.
        """
        with self._workers.lock:
            if self._left:
                raise RequestError("Queue the prompt again: its ComfyUI is gone")
            message = replace(message, id=number)
            if isinstance(message, Evaluate):
                message = replace(message, **self._of_tensors(message, tensors))
            if isinstance(message, Evaluate | Sample):
                return replace(message, patches=self._patch_set(message.patches))
            if isinstance(message, Patch):
                base, patches = self._patch_set(message.base), self._patch_set(message.number)
                self._patches = {0: 0, None: None, message.number: patches}  # no other is in the weights afterwards
                return replace(message, number=patches, base=base)
            return message

    def leave(self) -> None:
        """Nobody uses these tensors any more, and nothing is translated."""
        with self._workers.lock:
            self._workers.orphans += [kept.number for kept in self._tensors.values()]
            self._tensors.clear()
            self._left = True

    def _patch_set(self, number: int | None) -> int | None:
        """A number that no weights have, for a set that the client has not just sent."""
        return self._patches[number] if number in self._patches else next(self._workers.patches)

    def _of_tensors(self, message: Evaluate, tensors: Tensors) -> dict:
        known = {ours: kept for ours, kept in self._tensors.items() if ours not in message.forget}
        for name, ours in message.keep.items():
            known[ours] = _Kept(next(self._workers.tensors), tensors[name].nbytes if name in tensors else 0)
        lost = [name for name, ours in message.reuse.items() if ours not in known]
        if lost:
            raise RequestError(f"Queue the prompt again: tensor {lost[0]!r} was never sent")
        nbytes = sum(kept.nbytes for kept in known.values())
        if nbytes > MOST_BYTES or len(known) > max(MOST_TENSORS, len(message.keep) + len(message.reuse)):
            raise RequestError(
                f"Use shorter prompts, or smaller batches or references: the server keeps {MOST_TENSORS} tensors of "
                f"prompts of {MOST_BYTES / 1e9:.1f} GB for each ComfyUI, and was to keep {len(known)} of "
                f"{nbytes / 1e9:.1f} GB"
            )
        gone = {*self._tensors.values()}.difference(known.values())
        forget, self._tensors = [*(kept.number for kept in gone), *self._workers.orphans], known
        self._workers.orphans.clear()
        return {
            "forget": sorted(forget),
            "keep": {name: known[ours].number for name, ours in message.keep.items()},
            "reuse": {name: known[ours].number for name, ours in message.reuse.items()},
        }
