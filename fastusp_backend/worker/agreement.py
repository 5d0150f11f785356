"""What one rank fails in, all refuse: the ranks do a part of a request and tell each other how it went."""

import traceback
from collections.abc import Callable
from typing import TypeVar

from ..engine import Engine
from ..errors import FastUSPError, PatchesLost
from .crew import Crew
from .memory import EVALUATING, explain, is_out_of_memory

T = TypeVar("T")


class Refused(Exception):
    """A request that rank `rank` could not prepare; kind: see `protocol.Failed`. Raised on all ranks alike."""

    def __init__(self, rank: int, kind: str, text: str):
        super().__init__(text)
        self.rank = rank
        self.kind = kind


class Agreement:
    """doing: what the ranks are at, for a failure that ends one of them, see memory.py."""

    def __init__(self, crew: Crew, engine: Engine):
        self._crew, self._engine = crew, engine
        self.doing = EVALUATING

    def together(self, part: Callable[[], T], doing: str) -> T:
        """part() on every rank. Raises Refused where it failed on any. Collective."""
        problem, result, self.doing = "", None, doing
        try:
            result = part()
        except PatchesLost as error:
            problem = f"unpatched\n{error}"
        except (FastUSPError, ValueError) as error:
            problem = f"refused\n{error}"
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or _importing(error):
                raise
            problem = f"out_of_memory\n{explain(error, doing, self._engine.held())}"
        for rank, text in enumerate(self._crew.gather(problem)):
            if text:
                result = None  # the error's traceback holds it, and with it buffers and graphs that are to go
                raise Refused(rank, *text.split("\n", 1))
        self.doing = EVALUATING
        return result

    def together_or_drop(self, part: Callable[[], T], doing: str) -> T:
        """`together`; where memory ran out, buffers and graphs are given back."""
        try:
            return self.together(part, doing)
        except Refused as refused:
            if refused.kind == "out_of_memory":
                self._engine.drop_evaluations()
            raise


def _importing(error: BaseException) -> bool:
    """Whether it comes out of an import: half a module may be left, on which later requests would fail. What plain
    requests need is imported before them; patches on CPU ranks, and what is compiled, import hundreds of modules."""
    codes = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(code.co_name == "<module>" or code.co_filename.startswith("<frozen importlib") for code in codes)
