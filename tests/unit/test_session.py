"""What a session makes of its arguments."""

from types import SimpleNamespace

import pytest
import torch
from support import SOME_FILE

from fastusp_backend.config import Layout, ModelSpec, Settings
from fastusp_backend.pool import Progress, Session
from fastusp_backend.pool import session as sessions
from fastusp_backend.pool.contact import Contact
from fastusp_backend.pool.session import _distinct
from fastusp_backend.prompt import Prompt

pytestmark = pytest.mark.unit


def test_equal_control_travels_once():
    """ComfyUI adds up two ControlNets' tensors block by block, and expands one over a batch."""
    residuals = [torch.full((2, 4, 8), value) for value in (1.0, 2.0, 1.0)]
    residuals[1][0, 0] = 1  # begins like the others
    expanded = torch.ones(1, 4, 8).expand(2, 4, 8)
    places, tensors = _distinct({"input": [*residuals, expanded], "output": [None, expanded]}, torch.float32)
    assert places == {"input": [0, 1, 0, 2], "output": [None, 2]}
    assert [len(t) for t in tensors.values()] == [2, 2, 1]
    assert torch.equal(tensors["control.1"], residuals[1])
    for other in (torch.ones(2, 4, 8).double(), torch.ones(2, 8, 4), torch.tensor(1.0), torch.empty(0, 4, 8)):
        assert _distinct({"input": [residuals[0], other]}, torch.float32)[0] == {"input": [0, 1]}


@pytest.fixture
def sampled(monkeypatch):
    """sampled(settings) -> the message that a run sends, and what its workers say of the last request."""

    def sample(settings: Settings):
        contact = type("Workers", (Contact,), dict.fromkeys(Contact.__abstractmethods__))(None, print)
        contact.channel = SimpleNamespace(frame=lambda *_, **__: None)
        contact._link = SimpleNamespace(send=lambda *_: None)
        sent = []

        def submit(workers, message, tensors, progress, meanwhile):
            sent.append(message)
            workers.send(message, tensors)
            return {"output": tensors["x"]}

        monkeypatch.setattr(sessions, "submit", submit)
        pool = SimpleNamespace(crowded=False, following=lambda progress, **_: progress, run=lambda run, _: run(contact))
        spec = ModelSpec(path="/m", file=SOME_FILE, storage=None, compute="float32")
        session = Session(pool, spec, (Layout(ulysses=1, ring=1),), settings)
        x = torch.zeros(1, 4, 2, 2)
        session.sample(x, torch.tensor([1.0, 0.5, 0.0]), sampler="euler", positive=Prompt(x), progress=Progress())
        return sent[0], contact.last_request()

    return sample


def test_options_that_ranks_never_read_are_told_of_though_they_are_not_sent(sampled):
    sent, told = sampled(Settings(wire="int8", residency="park", cache="easy", cache_threshold=0.2))
    assert sent.settings == Settings(wire="int8"), "buffers and graphs are made for what is sent"
    assert told["options"] == "wire int8, residency park, cache easy, cache_threshold 0.2"


@pytest.mark.parametrize(
    "changed",
    [
        {"residency": "release"},
        {"cache": "first_block"},
        {"cache": "easy", "cache_threshold": 0.3, "cache_start": 0.2, "cache_end": 0.8},
    ],
    ids=str,
)
def test_what_ranks_never_read_is_sent_as_it_is_by_default(sampled, changed):
    """Or each change of it would have graphs made anew. All else is sent as it is."""
    others = {"wire": "fp8", "attention": "math", "compile": False, "cuda_graphs": False, "overlap": False}
    others |= {"ring_pipeline": False, "linear": "fp8", "weights": "shared"}
    assert others.keys() | sessions._READ_HERE.keys() == {*Settings.__struct_fields__}
    message, _ = sampled(Settings(**others, **changed))
    assert message.settings == Settings(**others)
    assert (message.cache is None) == ("cache" not in changed)
