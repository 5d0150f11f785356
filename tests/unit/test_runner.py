"""A rank refuses together with the others, and makes no mesh before all of them hold the model."""

import importlib.machinery
import weakref
from types import SimpleNamespace

import msgspec
import pytest
import torch
from support import SOME_FILE

from fastusp_backend import pulse
from fastusp_backend.comm.groups import OutOfMemoryTogether
from fastusp_backend.config import Layout, ModelSpec, Settings
from fastusp_backend.errors import CheckpointError
from fastusp_backend.protocol import Done, Evaluate, Failed, Park, Shutdown
from fastusp_backend.worker.activity import WAITING
from fastusp_backend.worker.agreement import Agreement
from fastusp_backend.worker.runner import IDLE_SECONDS, Runner

pytestmark = pytest.mark.unit

REQUEST = Evaluate(
    id=7,
    model=ModelSpec(path="/m", file=SOME_FILE, storage=None, compute="float32"),
    layout=Layout(ulysses=2, ring=1),
    settings=Settings(),
)


class Crew:
    """Rank 0 of two; the other rank says `other`."""

    rank, size = 0, 2

    def __init__(self, other: str):
        self.other = other

    def broadcast(self, payload):
        return payload

    broadcast_tensors = broadcast

    def agree(self, stop):
        return stop

    def maximum(self, number):
        return number

    def all_gather(self, text):
        return [text, text if text.isdigit() else self.other]  # it has met others as often


class Control:
    def __init__(self, tensors=()):
        self.work = [(Shutdown(), {}), (REQUEST, {"x": torch.ones(1), "context": torch.ones(1), **dict(tensors)})]
        self.sent = []

    def next_request(self):
        return self.work.pop()

    def send(self, message, tensors=None):
        self.sent.append(message)


class Engine:
    device, patches = torch.device("cpu"), 0
    spec, parked, nbytes, transport, placement, streams, unpacked = None, False, 0, "", "", False, False
    shares_memory, spare, meetings = False, 0, 0

    def __init__(self, describe=lambda: None, load=lambda: None):
        self._describe, self.load = describe, load
        self.meshes = self.releases = self.drops = 0

    def is_resident(self, spec):
        return False

    def describe(self, spec):
        self._describe()
        return SimpleNamespace(heads=4)

    def make_room(self):
        pass

    def share(self):
        pass

    def release(self):
        self.releases += 1

    def drop_evaluations(self):
        self.drops += 1

    def memory_report(self):
        return "9 GB of weights"

    def memory(self):
        return None

    def connect(self, layout, settings):
        self.meshes += 1


def serve(engine: Engine, other: str, tensors=()) -> Failed:
    control = Control(tensors)
    Runner(Crew(other), engine, control).serve()
    return control.sent[-1]


def fail(error):
    def failing(*_, **__):
        raise error

    return failing


@pytest.mark.parametrize("what", ["out_of_memory\nnot enough", "refused\nnot enough"])
def test_a_failure_of_another_rank_is_told_before_a_mesh_is_made(what):
    engine = Engine()
    failed = serve(engine, what)
    assert failed == Failed(id=7, kind=what.split("\n")[0], rank=1, text="not enough")
    assert engine.meshes == 0


@pytest.mark.parametrize("where, releases", [("describe", 0), ("load", 1)])
def test_an_own_failure_is_told_whole(where, releases):
    """A file that is refused by its header leaves the resident model; what fails later leaves none on any rank."""
    engine = Engine(**{where: fail(CheckpointError("bad\nfile"))})
    assert serve(engine, "") == Failed(id=7, kind="refused", rank=0, text="bad\nfile")
    assert engine.meshes == 0 and engine.releases == releases


CPU_ALLOCATOR = "[enforce fail at x.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
CUDA_ALLOCATOR = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.1 GiB"


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError(CUDA_ALLOCATOR), "it asked for 2.50 GiB; it had 9 GB of weights."),
        (RuntimeError(CPU_ALLOCATOR + ". Error code 12"), "it asked for 99 bytes; it had 9 GB of weights."),
        (MemoryError("no room"), "no room; it had 9 GB of weights."),
    ],
)
def test_an_own_lack_of_memory_says_what_was_asked_and_held(error, asked):
    engine = Engine(load=fail(error))
    failed = serve(engine, "")
    assert (failed.kind, failed.rank) == ("out_of_memory", 0)
    assert failed.text.startswith(f"while it loaded the model: {asked} Free memory"), failed.text
    assert engine.meshes == 0 and engine.releases == 1


@pytest.mark.parametrize("where", ["module", "machinery"])
def test_a_lack_of_memory_within_an_import_ends_the_pool(tmp_path, monkeypatch, where):
    """Half of the module, or of those that it imports, may be left."""

    def load():
        import half_imported  # noqa: F401

    (tmp_path / "half_imported.py").write_text("raise MemoryError")
    monkeypatch.syspath_prepend(tmp_path)
    if where == "machinery":
        monkeypatch.setattr(importlib.machinery.SourceFileLoader, "get_data", fail(MemoryError()))
    with pytest.raises(MemoryError, match="while it loaded the model: .*; it had 9 GB of weights"):
        serve(Engine(load=load), "")


def test_an_error_after_the_ranks_began_to_read_ends_the_pool():
    """What it says of memory changes nothing: the other ranks wait for this one's part."""
    with pytest.raises(RuntimeError, match="had begun"):
        serve(Engine(load=fail(RuntimeError(f"reading failed when the ranks had begun: {CUDA_ALLOCATOR}"))), "")


def test_a_lack_of_memory_while_the_ranks_read_ends_the_pool_and_says_what_helps():
    fatal = RuntimeError("reading /m failed when the ranks had begun")
    fatal.__cause__ = torch.OutOfMemoryError(CUDA_ALLOCATOR)
    with pytest.raises(MemoryError, match="while it loaded the model: it asked for 2.50 GiB.*use a smaller file"):
        serve(Engine(load=fail(fatal)), "")


def test_an_evaluation_that_does_not_fit_drops_what_others_left_but_not_the_weights():
    engine = Engine()
    engine.denoiser = fail(torch.OutOfMemoryError(CUDA_ALLOCATOR))
    failed = serve(engine, "", {"timestep": torch.ones(1)})
    assert failed.kind == "out_of_memory" and "made room for an evaluation" in failed.text
    assert (engine.releases, engine.drops) == (0, 1)


def test_what_fits_but_beside_another_layouts_evaluations_is_made_without_them():
    """On all ranks alike, whichever lacks the room."""

    def drop():
        engine.drops, engine.shares_memory = engine.drops + 1, False

    engine, crew, made = Engine(), Crew(""), []
    engine.shares_memory, engine.drop_evaluations = True, drop
    crew.all_gather = lambda text: [text, "out_of_memory\nnot enough" if engine.shares_memory else ""]
    assert Agreement(crew, engine).together_or_drop(lambda: made.append(1) or "made", "") == "made"
    assert engine.drops == 1 and made == [1, 1]


def test_a_lack_of_memory_on_one_rank_alone_while_a_mesh_is_made_ends_the_pool():
    """The others wait for it in the mesh's exchanges: they would not come to be told."""
    engine, crew = Engine(), Crew("")
    engine.connect = fail(torch.OutOfMemoryError(CUDA_ALLOCATOR))
    with pytest.raises(MemoryError, match="while it made room for an evaluation: it asked for 2.50 GiB; it had 9 GB"):
        Runner(crew, engine, Control()).serve()


def test_a_lack_of_memory_that_all_ranks_know_of_is_refused():
    engine = Engine()
    engine.connect = fail(OutOfMemoryTogether(1, "memory ran out on rank 1"))
    failed = serve(engine, "")
    assert (failed.kind, failed.rank, engine.drops) == ("out_of_memory", 1, 1)
    assert failed.text.startswith("while it made room for an evaluation: memory ran out on rank 1; it had")


def test_what_was_prepared_is_gone_when_evaluations_are_dropped():
    class Denoiser:
        def check(self, *_, **__):
            pass

        probe_memory = check

    class LateCrew(Crew):
        def all_gather(self, text):
            late = self.other if made else ""
            self.other = "" if made else self.other
            return [text, late]

    def denoiser(*_):
        new = Denoiser()
        made.append(weakref.ref(new))
        return new

    made, engine, control = [], Engine(), Control({"timestep": torch.ones(1)})
    engine.denoiser = denoiser
    engine.drop_evaluations = lambda: made.append(made[0]())
    Runner(LateCrew("out_of_memory\nnot enough"), engine, control).serve()
    assert control.sent[-1].kind == "out_of_memory" and made[1] is None


def test_a_lack_of_memory_within_an_evaluation_ends_the_pool_and_says_why():
    class Denoiser:
        def check(self, *_):
            pass

        def probe_memory(self, *_, spare):
            assert spare == 8

        __call__ = fail(torch.OutOfMemoryError(CUDA_ALLOCATOR))

    engine = Engine()
    engine.denoiser, engine.spare = lambda *_: Denoiser(), 8
    with pytest.raises(MemoryError, match="while it evaluated the model: it asked for 2.50 GiB; it had 9 GB"):
        serve(engine, "", {"timestep": torch.ones(1)})


def test_tensors_that_do_not_fit_the_device_are_refused():
    """Once the mesh is made: the other ranks, whose tensors may fit, would wait there."""
    engine = Engine()
    engine.denoiser = lambda *_: None
    failed = serve(engine, "", {"y": SimpleNamespace(to=fail(torch.OutOfMemoryError(CUDA_ALLOCATOR)))})
    assert engine.meshes == 1
    assert failed.kind == "out_of_memory" and "made room for an evaluation: it asked for 2.50 GiB" in failed.text


def test_a_lack_of_memory_before_a_request_is_understood_says_why():
    crew = Crew("")
    crew.broadcast_tensors = fail(torch.OutOfMemoryError(CUDA_ALLOCATOR))
    with pytest.raises(MemoryError, match="while it took in a request: it asked for 2.50 GiB; it had 9 GB"):
        Runner(crew, Engine(), Control()).serve()


def test_a_rank_that_waits_for_a_request_does_not_vouch_for_rank_0(tmp_path, monkeypatch):
    """Rank 0 hangs where it takes none for so long: what the others show must say no other."""
    monkeypatch.setattr(pulse, "_own", pulse.Pulse(tmp_path / "pulse"))
    shown = []

    class Follower(Crew):
        rank = 1

        def broadcast(self, payload):
            shown.append(pulse.Reader(tmp_path / "pulse").read())
            return msgspec.msgpack.encode(Shutdown())

    Runner(Follower(""), Engine(), None).serve()
    assert [(sign.doing, sign.seconds) for sign in shown] == [(WAITING, IDLE_SECONDS)]


def test_weights_that_cannot_be_parked_are_released():
    engine, control = Engine(), Control()
    engine.park = fail(MemoryError("no room"))
    control.work[1] = (Park(id=3), {})
    Runner(Crew(""), engine, control).serve()
    assert control.sent == [Done(id=3)] and engine.releases == 1
