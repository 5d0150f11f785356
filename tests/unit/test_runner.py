"""A rank refuses together with the others, and makes no mesh before all of them hold the model."""

from types import SimpleNamespace

import pytest
import torch

from fastusp_backend.config import Layout, ModelSpec, Settings
from fastusp_backend.errors import CheckpointError
from fastusp_backend.protocol import Evaluate, Failed, Shutdown
from fastusp_backend.worker.runner import Runner

pytestmark = pytest.mark.unit

REQUEST = Evaluate(
    id=7,
    model=ModelSpec(path="/m", mtime_ns=0, size=0, storage=None, compute="float32"),
    layout=Layout(ulysses=2, ring=1),
    settings=Settings(),
)


class Crew:
    """Rank 0 of two; the other rank says `other`."""

    rank, size = 0, 2

    def __init__(self, other: str):
        self.other = other

    def share(self, payload):
        return payload

    share_tensors = share

    def agree(self, stop):
        return stop

    def gather(self, text):
        return [text, self.other]


class Control:
    def __init__(self):
        self.work = [(Shutdown(), {}), (REQUEST, {"x": torch.ones(1), "context": torch.ones(1)})]
        self.sent = []

    def next_request(self):
        return self.work.pop()

    def send(self, message, tensors=None):
        self.sent.append(message)


class Engine:
    device, patches = torch.device("cpu"), 0

    def __init__(self, describe=lambda: None, load=lambda: None):
        self._describe, self.load = describe, load
        self.meshes = self.releases = 0

    def holds(self, spec):
        return False

    def describe(self, spec):
        self._describe()
        return SimpleNamespace(heads=4)

    def make_room(self):
        pass

    def release(self):
        self.releases += 1

    def denoiser(self, layout, settings):
        self.meshes += 1
        raise AssertionError("the other rank will never come")


def serve(engine: Engine, other: str) -> Failed:
    control = Control()
    Runner(Crew(other), engine, control).serve()
    return control.sent[-1]


def test_a_failure_of_another_rank_is_told_before_a_mesh_is_made():
    engine = Engine()
    failed = serve(engine, "out_of_memory\nnot enough")
    assert failed == Failed(id=7, kind="out_of_memory", rank=1, text="not enough")
    assert engine.meshes == 0 and engine.releases


@pytest.mark.parametrize("where, releases", [("describe", False), ("load", True)])
@pytest.mark.parametrize(
    "error, kind", [(CheckpointError("bad\nfile"), "refused"), (torch.OutOfMemoryError("bad\nfile"), "out_of_memory")]
)
def test_an_own_failure_is_told_whole(error, kind, where, releases):
    """A file that is refused by its header leaves the resident model; what fails later leaves none on any rank."""

    def fail():
        raise error

    engine = Engine(**{where: fail})
    assert serve(engine, "") == Failed(id=7, kind=kind, rank=0, text="bad\nfile")
    assert engine.meshes == 0 and bool(engine.releases) == (releases or kind == "out_of_memory")
