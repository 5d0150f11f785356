"""Clients take turns, and one in the middle of something keeps its own."""

import threading
import time

import pytest
import torch
from channels import WHAT

from fastusp_backend.errors import RequestError
from fastusp_backend.protocol import Evaluate, Patch, Release, Sample
from fastusp_backend.server import turns as module
from fastusp_backend.server.turns import Job, Turns

pytestmark = pytest.mark.unit

EVALUATE = Evaluate(id=1, **WHAT)
SAMPLE = Sample(id=1, **WHAT, sampler="euler", options={}, timestep_scale=1.0, cfg=1.0)
PATCH = Patch(id=1, model=WHAT["model"], number=1, base=0, weights={})


class Queue:
    def __init__(self):
        self.turns = Turns()

    def add(self, client: str, message=SAMPLE) -> bool:
        return self.turns.add(client, Job(message, {}))

    def next(self, seconds: float = 0.0) -> str | None:
        """The client whose job is taken, and done at once."""
        taken = self.turns.take(seconds)
        if taken is None:
            return None
        self.turns.done(taken[1].message)
        return taken[0]


@pytest.fixture
def queue():
    return Queue()


def test_a_request_each(queue):
    for client in "aaabbc":
        queue.add(client)
    assert [queue.next() for _ in range(7)] == ["a", "b", "c", "a", "b", "a", None]


def test_whoever_waits_for_others_is_told(queue):
    assert not queue.add("a") and not queue.add("a") and queue.add("b")
    client, job = queue.turns.take(0)
    assert client == "a" and queue.add("c")
    queue.turns.leave("b")
    queue.turns.done(job.message)
    assert [queue.next(), queue.next(), queue.next()] == ["c", "a", None]


@pytest.mark.parametrize("message", [EVALUATE, PATCH])
def test_between_two_of_them_nobody_comes(queue, message):
    queue.add("a", message)
    assert queue.next() == "a"
    assert queue.add("b") and queue.next() is None  # kept for a
    queue.add("a", message)
    assert queue.next() == "a"
    queue.turns.leave("a")
    assert queue.next() == "b"


@pytest.mark.parametrize("message", [SAMPLE, Release(id=1)])
def test_behind_others_it_is_the_next_ones_turn(queue, message):
    queue.add("a", message)
    assert queue.next() == "a"
    queue.add("b")
    queue.add("a")
    assert queue.next() == "b"


def test_a_turn_that_is_kept_ends_in_time(queue, monkeypatch):
    monkeypatch.setitem(module.KEPT_SECONDS, Evaluate, 0.2)
    queue.add("a", EVALUATE)
    queue.next()
    queue.add("b")
    began = time.monotonic()
    assert queue.next(5) == "b" and 0.1 < time.monotonic() - began < 2


def test_nobody_keeps_it_for_ever(queue, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_SECONDS", 0.0)
    queue.add("a", EVALUATE)
    queue.add("b", EVALUATE)
    assert [queue.next(), queue.next()] == ["a", "b"]
    queue.add("a", PATCH)
    assert queue.next(2) == "a"
    queue.add("b")
    assert queue.next() is None  # what was patched is sampled with first


def test_a_job_that_comes_wakes_who_waits(queue):
    threading.Timer(0.1, queue.add, ("a",)).start()
    assert queue.next(5) == "a"


def test_who_is_gone_waits_for_nothing(queue):
    queue.add("a")
    queue.turns.leave("a")
    queue.turns.leave("never here")
    assert queue.next() is None


def test_who_comes_anew_is_not_before_those_who_wait(queue):
    """Also one that comes again and again."""
    queue.add("a")
    queue.next()
    queue.add("a")
    queue.add("b")
    for name in ("b", "c", "d"):
        queue.turns.leave(name)
        queue.add(name)
    assert [queue.next() for _ in range(4)] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("message", [EVALUATE, PATCH])
def test_who_leaves_in_its_turn_keeps_it_not(queue, message):
    queue.add("a", message)
    client, job = queue.turns.take(0)
    queue.turns.leave(client)
    assert queue.add("b")  # what it has asked for is still worked on
    queue.turns.done(job.message)
    assert not queue.add("b") and queue.next() == "b"
    queue.turns.leave("b")
    assert not queue.turns._waiting and not queue.turns._place and queue.turns._last is None


def test_what_waits_can_be_dropped(queue):
    first, second = Release(id=5), Release(id=6)
    queue.add("a", first)
    queue.add("a", second)
    assert queue.turns.drop("a", 5) and not queue.turns.drop("a", 5) and not queue.turns.drop("b", 6)
    assert queue.turns.take(0)[1].message is second


def test_no_more_waits_than_may(queue, monkeypatch):
    for _ in range(module.WAITING):
        queue.add("a")
    with pytest.raises(RequestError, match=f"^Queue the prompt again when .*{module.WAITING} requests of this ComfyUI"):
        queue.add("a")
    monkeypatch.setattr(module, "CLIENT_BYTES", 4)
    monkeypatch.setattr(module, "ALL_BYTES", 16)
    large = Job(SAMPLE, {"x": torch.zeros(2)})
    queue.turns.add("b", large)  # its only one
    with pytest.raises(RequestError, match="^Queue the prompt again when"):
        queue.turns.add("b", large)
    queue.turns.add("c", large)
    with pytest.raises(RequestError, match="^Use smaller images, batches or LoRAs: .* too many"):
        queue.turns.add("d", Job(SAMPLE, {"x": torch.zeros(5)}))
    with pytest.raises(RequestError, match="^Queue the prompt again later: the requests of all clients"):
        queue.turns.add("d", large)
    client, job = queue.turns.take(0)
    assert client == "a" and job.nbytes == 0
    queue.turns.done(job.message)
    queue.turns.leave("a")
    assert queue.turns.take(0) == ("b", large)
    with pytest.raises(RequestError, match="^Queue the prompt again later"):
        queue.turns.add("d", large)  # what is under way is held as well
    queue.turns.add("b", Job(SAMPLE, {}))
    queue.turns.done(SAMPLE)
    queue.turns.add("d", large)
