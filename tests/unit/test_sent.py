"""What the workers have been sent: a prompt travels once, and what is in doubt travels anew."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from fake_pool import ENDINGS, names_sent, stopping, waiting
from fake_workers import X, evaluate, lora, rank, script, session
from support import randn

from fastusp_backend.errors import Cancelled, PoolError, ProtocolError, TensorsLost
from fastusp_backend.pool import Progress, request
from fastusp_backend.pool.progress import QUIET
from fastusp_backend.pool.sent import KEPT_TENSORS
from fastusp_backend.pool.session import _distinct
from fastusp_backend.prompt import Prompt
from fastusp_backend.protocol import Patch, Release

pytestmark = pytest.mark.unit


def test_a_prompt_is_sent_once(pool):
    contexts = [randn(1, 3, 4, seed=i) for i in range(2)]
    for context in (contexts[0], contexts[0].clone(), contexts[1], contexts[0]):
        assert torch.equal(evaluate(pool, context), context)
    step = {"x", "timestep"}
    assert names_sent(pool) == [step | {"context", "y"}, step, step | {"context"}, step]


def test_a_tensor_that_its_owner_changes_is_sent_again(pool):
    context = torch.zeros(1, 3, 4)
    evaluate(pool, context)
    context += 1
    assert torch.equal(evaluate(pool, context), torch.ones(1, 3, 4))


def test_a_prompt_of_more_tensors_than_are_kept_is_kept_whole(pool):
    given = torch.ones(1, 3, 4)
    many = Prompt(given, references=tuple(randn(1, 16, 2, 2, seed=n) for n in range(KEPT_TENSORS + 2)))
    for _ in range(2):
        for prompt in (many, Prompt(given * 2), Prompt(given)):
            session(pool).evaluate(X, torch.ones(1), prompt, QUIET)
    assert len(rank(pool).kept) <= KEPT_TENSORS + 2


def test_types_are_told_apart(pool):
    evaluate(pool, torch.zeros(1, 3, 4))
    assert evaluate(pool, torch.zeros(1, 3, 4).half()).dtype == torch.float16


def test_what_is_used_last_is_forgotten_last(pool):
    first = randn(1, 3, 4, seed=100)
    for i in range(3 * KEPT_TENSORS):
        evaluate(pool, first)
        evaluate(pool, randn(1, 3, 4, seed=i))
    assert len(rank(pool).kept) <= KEPT_TENSORS + 1
    assert sum("context" in names for names in names_sent(pool)) == 3 * KEPT_TENSORS + 1


def test_control_travels_once_a_tensor_in_the_compute_type(pool):
    """ComfyUI repeats the tensors of a ControlNet with few blocks."""
    one, two = torch.ones(1, 4, 8).half(), torch.zeros(1, 4, 8).half()
    control = {"input": [one, one, None, two], "output": [two]}
    session(pool).evaluate(X, torch.ones(1), Prompt(torch.ones(1, 3, 4)), QUIET, control)
    ((message, names),) = rank(pool).messages
    assert message.control == {"input": [0, 0, None, 1], "output": [1]}
    assert {name for name in names if name.startswith("control")} == {"control.0", "control.1"}
    _, tensors = _distinct(control, torch.float32)
    assert all(t.dtype == torch.float32 for t in tensors.values()) and torch.equal(tensors["control.1"], two.float())


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_was_not_answered_is_sent_anew(pool, ending):
    """Whether or not it arrived; and the workers are left with nothing that nobody knows of."""
    contexts = [randn(1, 3, 4, seed=i) for i in range(2)]
    evaluate(pool, contexts[0])
    script(ending)
    with pytest.raises(ENDINGS[ending][0], match=ENDINGS[ending][1]):
        evaluate(pool, contexts[1], progress=stopping(pool, ending))
    assert rank(pool).cancelled == ([2] if ending in ("misread", "interrupted", "late") else [])
    for context in contexts:
        assert torch.equal(evaluate(pool, context, progress=waiting(pool)), context)
    assert all("context" in names for names in names_sent(pool)[-2:])
    assert len(rank(pool).kept) == 3 and pool.starts == 1


def test_workers_that_lost_a_prompt_get_it_once_more(pool):
    """Another client's Release drops what all have sent."""
    context = torch.zeros(1, 3, 4)
    evaluate(pool, context)
    rank(pool).kept.clear()
    script("unkept")
    assert torch.equal(evaluate(pool, context), context) and "error" not in pool.status()
    step = {"x", "timestep"}
    assert names_sent(pool)[1:] == [step, step | {"context", "y"}]
    script("unkept", "unkept")
    with pytest.raises(TensorsLost):
        evaluate(pool, context)
    assert torch.equal(evaluate(pool, context), context)


def test_a_caller_who_stops_before_its_turn_changes_nothing(pool):
    """The one who has the turn goes on, and Stop is heard meanwhile."""
    evaluate(pool, torch.zeros(1, 3, 4))
    begun, going_on = threading.Event(), threading.Event()

    def work(workers):
        begun.set()
        going_on.wait(20)

    with ThreadPoolExecutor(1) as threads:
        turn = threads.submit(pool.run, work)
        assert begun.wait(20)
        for stop in (lambda: True, lambda: 1 / 0):
            with pytest.raises((Cancelled, ZeroDivisionError)):
                evaluate(pool, torch.ones(1, 3, 4), lora("a"), Progress(interrupted=stop))
        going_on.set()
        turn.result()
    evaluate(pool, torch.zeros(1, 3, 4))
    assert names_sent(pool)[-1] == {"x", "timestep"} and not rank(pool).sent(Patch)


def test_what_nobody_waits_for_any_more_is_cancelled(pool, monkeypatch):
    """A second Ctrl-C may come while the first one's cancel is on its way."""

    def interrupt(*_):
        raise KeyboardInterrupt

    evaluate(pool, torch.zeros(1, 3, 4))
    script("late")
    monkeypatch.setattr(request, "cancel", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(pool, torch.ones(1, 3, 4), progress=Progress(interrupted=interrupt))
    left = rank(pool).messages[-1][0].id
    assert torch.equal(evaluate(pool, torch.zeros(1, 3, 4), progress=waiting(pool)), torch.zeros(1, 3, 4))
    assert rank(pool).cancelled == [left] and pool.starts == 1


@pytest.mark.parametrize("ending", ["served", "misread", "interrupted", "gone"])
def test_what_is_released_is_sent_anew(pool, ending):
    """Also where that is not seen, or did not happen."""
    context, patches = torch.zeros(1, 3, 4), lora("a")
    evaluate(pool, context, patches)
    script(ending)
    try:
        pool.release()
    except (ProtocolError, PoolError, KeyboardInterrupt):
        assert ending != "served"
    for value in (context, context + 1):
        assert torch.equal(evaluate(pool, value, patches), value)
    assert len(rank(pool).kept) == 3 and rank(pool).patches == rank(pool).sent(Patch)[-1].number
    assert bool(rank(pool).sent(Release)) == (ending in ("served", "misread"))


def test_what_is_released_behind_a_prompt_that_was_left_is_sent_anew(pool):
    context, patches = torch.zeros(1, 3, 4), lora("a")
    evaluate(pool, context, patches)
    script("late", "late")
    with pytest.raises(Cancelled):
        evaluate(pool, context, patches, stopping(pool, "late"))
    pool.release()
    assert pool.status()["state"] == "stopping"
    assert torch.equal(evaluate(pool, context, patches, waiting(pool)), context)
    assert len(rank(pool).kept) == 2


@pytest.mark.parametrize("when", [("gone",), ("served", "gone")], ids=["patches", "prompt"])
def test_workers_that_died_are_replaced_and_sent_everything(pool, when):
    """At whichever message of a prompt that is noticed."""
    context = torch.zeros(1, 3, 4)
    evaluate(pool, context, lora("a"))
    old, patches = rank(pool), lora("b")
    script(*when)
    assert torch.equal(evaluate(pool, context, patches), context)
    assert pool.starts == 2 and rank(pool) is not old
    assert [change.weights for change in rank(pool).sent(Patch)] == [patches.weights]
    assert names_sent(pool) == [{"x", "timestep", "context", "y"}]
    assert "error" not in pool.status()


def test_workers_are_replaced_once(pool):
    evaluate(pool, torch.zeros(1, 3, 4))
    script("gone", "gone")
    with pytest.raises(PoolError, match="stopped before a prompt ran"):
        evaluate(pool, torch.zeros(1, 3, 4))
    assert pool.starts == 2
    evaluate(pool, torch.zeros(1, 3, 4))
    assert pool.starts == 3


def test_a_prompt_that_workers_die_of_is_not_tried_again(pool):
    evaluate(pool, torch.zeros(1, 3, 4))
    script("dies")
    with pytest.raises(PoolError, match="stopped while a prompt ran"):
        evaluate(pool, torch.zeros(1, 3, 4))
    assert pool.starts == 1


@pytest.mark.parametrize("ending, again", [("served", 0), ("interrupted", 1), ("misread", 1)])
def test_memory_that_may_never_have_arrived_is_not_written_to_again(pool, monkeypatch, ending, again):
    """Its descriptor goes with a frame, which Ctrl-C may keep from being sent."""
    evaluate(pool, torch.zeros(1, 3, 4))
    forgotten = []
    monkeypatch.setattr(pool._workers.channel, "forget", lambda: forgotten.append(1))
    script(ending)
    with nullcontext() if ending == "served" else pytest.raises(ENDINGS[ending][0]):
        evaluate(pool, torch.zeros(1, 3, 4))
    evaluate(pool, torch.zeros(1, 3, 4))
    evaluate(pool, torch.zeros(1, 3, 4))
    assert len(forgotten) == again
