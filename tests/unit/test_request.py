"""A request takes its own answer, whatever comes late of others."""

import time

import pytest
import torch

from fastusp_backend.errors import Cancelled, PatchesLost, ProtocolError, RequestError, TensorsLost
from fastusp_backend.pool import request
from fastusp_backend.pool.progress import QUIET, Progress
from fastusp_backend.pool.request import follow, submit
from fastusp_backend.protocol import Cancel, Done, Failed, Held, Phase, Ready, Step

pytestmark = pytest.mark.unit


class Workers:
    """Say what they are given, then nothing."""

    alive = True
    ready = Ready(version=1, devices=["a", "b"], pids=[1, 2], torch="2", backend="gloo")

    def __init__(self, *replies):
        self.replies, self.posted, self.left = list(replies), [], None

    def receive(self, seconds):
        return self.replies.pop(0) if self.replies else None

    def post(self, message):
        self.posted.append(message)

    def leave_behind(self, number):
        self.left = number


def step(number: int, index: int) -> Step:
    return Step(id=number, index=index, total=2, sigma=1.0, seconds=0.1)


def test_late_replies_of_a_request_that_was_given_up_are_dropped():
    stale, own = {"output": torch.zeros(1)}, {"output": torch.ones(1)}
    workers = Workers(
        (step(1, 5), stale),
        (Phase(id=1, text="late"), {}),
        (Done(id=1), stale),
        (Failed(id=1, kind="cancelled", rank=0, text=""), {}),
        (step(2, 0), own),
        (Held(id=2, model=None, state="none", nbytes=0, transport="", weights=""), {}),
        (Done(id=2), own),
    )
    steps, phases = [], []
    progress = Progress(step=lambda event, _: steps.append(event.index), phase=phases.append)
    assert follow(workers, 2, progress) is own
    assert steps == [0] and phases == []


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("refused", RequestError, "^no$"),
        ("unpatched", PatchesLost, "^no$"),
        ("unkept", TensorsLost, "^no$"),
        ("out_of_memory", RequestError, r"^rank 1 \(b\) ran out of memory no$"),
        ("cancelled", Cancelled, "request 2 was cancelled"),
    ],
)
def test_failures_are_told_apart(kind, error, words):
    with pytest.raises(error, match=words):
        follow(Workers((Failed(id=2, kind=kind, rank=1, text="no"), {})), 2, QUIET)


def test_a_refused_message_is_told():
    with pytest.raises(ProtocolError, match="refused a message: no"):
        follow(Workers((Failed(id=None, kind="protocol", rank=0, text="no"), {})), 2, QUIET)


def test_workers_that_ended_are_told():
    workers = Workers()
    workers.alive = False
    with pytest.raises(EOFError):
        follow(workers, 2, QUIET)


def test_a_cancel_that_is_not_answered_leaves_the_request_behind(monkeypatch):
    """Steps that come meanwhile are not shown."""
    monkeypatch.setattr(request, "CANCEL_SECONDS", 0.0)
    workers, steps = Workers((step(2, 0), {})), []
    with pytest.raises(Cancelled, match="will come to it"):
        follow(workers, 2, Progress(step=lambda event, _: steps.append(event.index), interrupted=lambda: True))
    assert workers.posted == [Cancel(id=2)] and workers.left == 2 and not steps


class Taking(Workers):
    """Take requests as well."""

    def __init__(self, *replies):
        super().__init__(*replies)
        self.did = []

    def send(self, message, tensors, meanwhile):
        self.did.append("sent")

    def receive(self, seconds):
        self.did.append("heard")
        return super().receive(seconds)


def test_something_is_done_while_the_workers_have_the_request():
    workers = Taking((Done(id=2), {}))
    submit(workers, Done(id=2), {}, QUIET, lambda: workers.did.append("meanwhile"))
    assert workers.did == ["sent", "meanwhile", "heard"]


def test_what_is_raised_meanwhile_cancels_the_request_and_is_raised():
    workers = Taking((step(2, 0), {}), (Failed(id=2, kind="cancelled", rank=0, text=""), {}))

    def obstructed():
        raise OSError("the caller's own")  # no error of the channel

    with pytest.raises(OSError, match="^the caller's own$"):
        submit(workers, Done(id=2), {}, QUIET, obstructed)
    assert workers.posted == [Cancel(id=2)] and not workers.replies


def found():
    raise LookupError("another pack")


def test_stop_is_heard_while_a_request_that_was_taken_back_is_not_answered():
    """Ranks that load weights hear no cancel. The next prompt waits for them."""
    workers, asked = Taking(), []

    def interrupted():
        asked.append(1)
        return len(asked) == 3

    began = time.monotonic()
    with pytest.raises(LookupError, match="another pack"):
        submit(workers, Done(id=2), {}, Progress(interrupted=interrupted), found)
    assert time.monotonic() - began < 1 and len(asked) == 3
    assert workers.posted == [Cancel(id=2)] and workers.left == 2


def test_who_cannot_be_asked_whether_to_stop_is_not_kept_waiting():
    workers = Taking()
    with pytest.raises(LookupError, match="another pack"):
        submit(workers, Done(id=2), {}, Progress(interrupted=lambda: 1 / 0), found)
    assert workers.posted == [Cancel(id=2)] and workers.left == 2


def test_a_request_that_was_taken_back_is_waited_for_where_nobody_stops():
    """So that the next one finds the ranks free."""
    cancelled = Failed(id=2, kind="cancelled", rank=0, text="")
    workers = Taking(*[None] * 5, (cancelled, {}))
    with pytest.raises(LookupError):
        submit(workers, Done(id=2), {}, QUIET, found)
    assert not workers.replies and workers.left is None
