"""What one rank fails in, all refuse: the ranks do a part of a request and tell each other how it went."""

import traceback
from collections.abc import Callable
from typing import TypeVar

from ..comm.groups import OutOfMemoryTogether, is_out_of_memory
from ..engine import Engine
from ..errors import FastUSPError, PatchesLost, TensorsLost
from ..protocol.messages import Request
from ..pulse import USUAL_SECONDS, beat, turn_to
from .activity import EVALUATING, PREPARING, explain
from .crew import Crew

T = TypeVar("T")


class Refused(Exception):
    """A request that rank `rank` could not prepare; kind: see `protocol.Failed`. Raised on all ranks alike."""

    def __init__(self, rank: int, kind: str, text: str):
        super().__init__(text)
        self.rank = rank
        self.kind = kind


class Agreement:
    def __init__(self, crew: Crew, engine: Engine):
        self._crew, self._engine = crew, engine
        self.doing = EVALUATING

    @property
    def doing(self) -> str:
        """What the ranks are at, see activity.py: for a failure that ends one of them, or one that hangs."""
        return self._doing

    @doing.setter
    def doing(self, doing: str) -> None:
        self._doing = doing
        turn_to(doing)
        beat(USUAL_SECONDS)

    def together(self, part: Callable[[], T], doing: str) -> T:
        """part() on every rank. Raises Refused where it failed on any. Collective."""
        problem, result, self.doing = "", None, doing
        try:
            result = part()
        except PatchesLost as error:
            problem = f"unpatched\n{error}"
        except TensorsLost as error:
            problem = f"unkept\n{error}"
        except (FastUSPError, ValueError) as error:
            problem = f"refused\n{error}"
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or _importing(error):
                raise
            problem = f"out_of_memory\n{explain(error, doing, self._engine.memory_report())}"
        for rank, text in enumerate(self._crew.all_gather(problem)):
            if text:
                result = None  # the error's traceback holds it, and with it buffers and graphs that are to go
                raise Refused(rank, *text.split("\n", 1))
        self.doing = EVALUATING
        return result

    def together_or_drop(self, part: Callable[[], T], doing: str) -> T:
        """`together`; where memory ran out, buffers and graphs are dropped. If they were more than one layout's on any
        rank, the part is tried once more: it may have the room that it has without another layout's."""
        while True:
            try:
                return self.together(part, doing)
            except Refused as refused:
                if refused.kind != "out_of_memory":
                    raise
                # The ranks may have come differently far in the part, and so may what they have cached.
                others = self._crew.all_gather("yes" if self._engine.shares_memory else "")
                self._engine.drop_evaluations()
                if not any(others):
                    raise

    def connect(self, request: Request) -> None:
        """Has the ranks of the request's layout know each other. What one rank fails in alone is raised and ends it, as
        the others wait for it in an exchange; memory that ran out where a whole group knows of it is Refused, unless
        ranks could not meet any more after it: then it is raised on all of them, which ends them."""
        self.doing = PREPARING
        told = ""
        try:
            self._engine.connect(request.layout, request.settings)
        except OutOfMemoryTogether as error:
            told = f"{error.rank}\n{explain(error, PREPARING, self._engine.memory_report())}"
        # Groups that evaluate different prompts do not hear of each other's.
        for text in self._crew.all_gather(told) if request.layout.batch > 1 else [told]:
            if text:
                self._engine.drop_evaluations()
                rank, why = text.split("\n", 1)
                if len(set(self._crew.all_gather(str(self._engine.meetings)))) > 1:
                    raise MemoryError(why)
                raise Refused(int(rank), "out_of_memory", why)


def _importing(error: BaseException) -> bool:
    """Whether it comes out of an import: half a module may be left, on which later requests would fail. What plain
    requests need is imported before them; patches on CPU ranks import hundreds of modules."""
    codes = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(code.co_name == "<module>" or code.co_filename.startswith("<frozen importlib") for code in codes)
