"""Two ranks, as threads, that come differently far in a part agree on what follows: neither waits alone."""

import threading

import pytest
import torch
from support import SOME_FILE

from fastusp_backend.comm.groups import OutOfMemoryTogether
from fastusp_backend.config import Layout, ModelSpec, Settings
from fastusp_backend.errors import PatchesLost, RequestError, TensorsLost
from fastusp_backend.protocol import Evaluate
from fastusp_backend.worker import agreement
from fastusp_backend.worker.activity import PREPARING
from fastusp_backend.worker.agreement import Agreement, Refused

pytestmark = pytest.mark.unit

LACK = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
SECONDS = 20


class Ranks:
    """What two ranks tell each other; each call waits for the other rank's."""

    def __init__(self):
        self.meeting, self.told = threading.Barrier(2), ["", ""]

    def crew(self, rank: int):
        class Crew:
            def all_gather(_, text):  # noqa: N805
                self.told[rank] = text
                self.meeting.wait(SECONDS)
                told = list(self.told)
                self.meeting.wait(SECONDS)
                return told

        return Crew()

    def run(self, work) -> list:
        """What work(crew, rank) gave, or raised, on each rank."""
        found: list = [None, None]

        def one(rank: int) -> None:
            try:
                found[rank] = work(self.crew(rank), rank)
            except (Refused, MemoryError, threading.BrokenBarrierError) as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


class Engine:
    def __init__(self, cached: int, meetings: int = 3):
        self.cached, self.meetings = cached, meetings

    @property
    def shares_memory(self) -> bool:
        return self.cached > 1

    def drop_evaluations(self) -> None:
        self.cached = 0

    def memory_report(self) -> str:
        return "little"


@pytest.fixture(autouse=True)
def no_pulse(monkeypatch):
    for name in ("turn_to", "beat"):
        monkeypatch.setattr(agreement, name, lambda *_: None)


@pytest.mark.parametrize(
    "error, kind", [(PatchesLost, "unpatched"), (TensorsLost, "unkept"), (RequestError, "refused")]
)
def test_what_one_rank_fails_in_is_refused_by_its_kind(error, kind):
    def work(crew, rank):
        def part():
            if rank:
                raise error("no")

        return Agreement(crew, Engine(0)).together(part, PREPARING)

    assert [(r.rank, r.kind, str(r)) for r in Ranks().run(work)] == [(1, kind, "no")] * 2


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 0)], ids=["a layout more", "other options", "widened"])
def test_one_rank_lacks_memory_before_the_others_cache_or_drop(before, after):
    def work(crew, rank):
        engine, tries = Engine(before), []

        def part():
            tries.append(1)
            if rank == 1 and len(tries) == 1:
                raise LACK
            engine.cached = after if len(tries) == 1 else 1
            return "made"

        return Agreement(crew, engine).together_or_drop(part, PREPARING)

    assert Ranks().run(work) == ["made", "made"]


def test_without_other_layouts_it_is_refused_by_both():
    def work(crew, rank):
        def part():
            if rank == 1:
                raise LACK

        return Agreement(crew, Engine(1)).together_or_drop(part, PREPARING)

    for error in Ranks().run(work):
        assert isinstance(error, Refused) and (error.rank, error.kind) == (1, "out_of_memory")


@pytest.mark.parametrize("met, error_of", [((3, 3), Refused), ((3, 4), MemoryError)])
def test_groups_hear_of_memory_that_another_group_lacks(met, error_of):
    """Those of prompts that are evaluated side by side exchange nothing else. Ranks that could not meet again end."""
    spec = ModelSpec(path="/m", file=SOME_FILE, storage=None, compute="float32")
    request = Evaluate(id=1, model=spec, layout=Layout(batch=2, ulysses=1, ring=1), settings=Settings())

    def work(crew, rank):
        engine = Engine(1, met[rank])

        def connect(layout, settings):
            if rank == 1:
                raise OutOfMemoryTogether(1, "memory ran out on rank 1")

        engine.connect = connect
        return Agreement(crew, engine).connect(request)

    for error in Ranks().run(work):
        assert type(error) is error_of and "memory ran out on rank 1" in str(error)
        if error_of is Refused:
            assert (error.rank, error.kind) == (1, "out_of_memory")
