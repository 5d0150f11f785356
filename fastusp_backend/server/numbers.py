"""Numbers that clients give to tensors and patch sets, and those under which the workers have them: two clients may
have given the same."""

import itertools

from msgspec.structs import replace

from ..errors import RequestError
from ..protocol import Evaluate, Message, Patch, Sample


class WorkerNumbers:
    """Those of one set of workers, given once; and the tensors whose client is gone, until they are told to forget
    them."""

    def __init__(self):
        self.tensors, self.patches = itertools.count(), itertools.count(1)
        self.orphans: list[int] = []


class ClientNumbers:
    """One client's numbers -> the workers'."""

    def __init__(self, workers: WorkerNumbers):
        self._workers = workers
        self._tensors: dict[int, int] = {}
        self._patches: dict[int | None, int | None] = {0: 0, None: None}

    def translate(self, message: Message, number: int) -> Message:
        """What the workers are sent in place of a client's request, as their request `number`. Raises RequestError for
        a tensor that the client has not sent."""
        message = replace(message, id=number)
        if isinstance(message, Evaluate):
            message = replace(message, **self._of_tensors(message))
        if isinstance(message, Evaluate | Sample):
            return replace(message, patches=self._patch_set(message.patches))
        if isinstance(message, Patch):
            return replace(message, number=self._patch_set(message.number), base=self._patch_set(message.base))
        return message

    def leave(self) -> None:
        """Nobody uses these tensors any more."""
        self._workers.orphans += self._tensors.values()
        self._tensors.clear()

    def _patch_set(self, number: int | None) -> int | None:
        if number not in self._patches:
            self._patches[number] = next(self._workers.patches)
        return self._patches[number]

    def _of_tensors(self, message: Evaluate) -> dict:
        forget = [self._tensors.pop(number) for number in message.forget if number in self._tensors]
        forget += self._workers.orphans
        self._workers.orphans.clear()
        for number in message.keep.values():
            self._tensors[number] = next(self._workers.tensors)
        lost = [name for name, number in message.reuse.items() if number not in self._tensors]
        if lost:
            raise RequestError(f"Queue the prompt again: tensor {lost[0]!r} was never sent")
        return {
            "forget": forget,
            "keep": {name: self._tensors[number] for name, number in message.keep.items()},
            "reuse": {name: self._tensors[number] for name, number in message.reuse.items()},
        }
