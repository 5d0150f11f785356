"""What the workers have been sent: prompts and patches travel once, and what is in doubt travels anew."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import msgspec
import pytest
import torch
from fake_workers import SPEC, FakeProcesses, FakeWorkers, X, evaluate, lora, rank, script, session
from support import randn, wait_until

from fastusp_backend.config import Settings
from fastusp_backend.devices import Devices
from fastusp_backend.errors import Cancelled, PatchesLost, PoolError, ProtocolError, RequestError
from fastusp_backend.pool import NO_PATCHES, Pool, Progress, WeightPatches, request, workers
from fastusp_backend.pool import pool as pools
from fastusp_backend.pool.progress import QUIET
from fastusp_backend.pool.sent import KEPT_TENSORS
from fastusp_backend.pool.session import _distinct
from fastusp_backend.prompt import Prompt
from fastusp_backend.protocol import Evaluate, Patch, Release, Sample

pytestmark = pytest.mark.unit


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(pools, "Workers", FakeWorkers)
    monkeypatch.setattr(workers, "Processes", FakeProcesses)
    monkeypatch.setattr(FakeWorkers, "script", [])
    monkeypatch.setattr(request, "CANCEL_SECONDS", 0.0)
    pool = Pool(Devices(ranks=1))
    yield pool
    pool.close()


def names_sent(pool) -> list[set[str]]:
    return [names for message, names in rank(pool).messages if isinstance(message, Evaluate)]


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


ENDINGS = {
    "refused": (RequestError, "it was refused"),
    "cancelled": (Cancelled, "was cancelled"),
    "misread": (ProtocolError, "refused a message"),
    "interrupted": (KeyboardInterrupt, None),
    "late": (Cancelled, "will come to it"),
}


def stopping(pool, ending: str) -> Progress:
    """Stops what is not answered; and the workers come to it when the next prompt waits for them."""
    rank_now = rank(pool)
    return Progress(interrupted=lambda: ending == "late" and bool(rank_now._late))


def waiting(pool) -> Progress:
    rank_now = rank(pool)
    return Progress(phase=lambda text: rank_now.catch_up())


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


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_change_that_was_not_answered_is_made_anew(pool, ending):
    """The prompt's tensors that the workers have are not sent again for it."""
    context, patches = torch.zeros(1, 3, 4), lora("a")
    evaluate(pool, context)
    script(ending)
    with pytest.raises(ENDINGS[ending][0]):
        evaluate(pool, context, patches, stopping(pool, ending))
    evaluate(pool, context, patches, waiting(pool))
    change = rank(pool).sent(Patch)[-1]
    assert change.base is None and change.weights == patches.weights and rank(pool).patches == change.number
    assert names_sent(pool)[-1] == {"x", "timestep"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_patches_outlive_the_failure_of_a_prompt(pool, ending):
    """What was answered is not done again."""
    patches = lora("a")
    script("served", ending)
    pool.start()
    wait_until(lambda: pool._workers.ready is not None, 5)
    with pytest.raises(ENDINGS[ending][0]):
        evaluate(pool, torch.zeros(1, 3, 4), patches, stopping(pool, ending))
    evaluate(pool, torch.zeros(1, 3, 4), patches, waiting(pool))
    assert len(rank(pool).sent(Patch)) == 1


def test_only_weights_that_differ_are_patched(pool):
    both = lora("a", "b")
    for patches in (both, both, WeightPatches({"b": both.weights["b"]}, both.tensors), NO_PATCHES, NO_PATCHES):
        evaluate(pool, torch.zeros(1, 3, 4), patches)
    changes = rank(pool).sent(Patch)
    assert [sorted(change.weights) for change in changes] == [["a", "b"], ["a"], ["b"]]
    assert [change.base for change in changes] == [0, *(change.number for change in changes[:-1])]
    assert changes[-1].number == 0 and rank(pool).patches == 0


def test_another_model_is_taken_to_be_as_its_file(pool):
    other, patches = msgspec.structs.replace(SPEC, path="/other"), lora("a")
    for model in (SPEC, other, SPEC):
        session(pool, patches, model).sample(X, torch.ones(2), sampler="euler", positive=Prompt(torch.ones(1, 3, 4)))
    assert [change.base for change in rank(pool).sent(Patch)] == [0, 0, 0]


def test_workers_that_lost_their_patches_get_them_once_more(pool):
    context, patches = torch.zeros(1, 3, 4), lora("a")
    evaluate(pool, context, patches)
    rank(pool).patches = 99
    evaluate(pool, context, patches)
    assert [change.base for change in rank(pool).sent(Patch)] == [0, None] and "error" not in pool.status()
    script("unpatched", "served", "unpatched")
    with pytest.raises(PatchesLost):
        evaluate(pool, context, patches)
    assert pool.status()["error"] == "it was unpatched"
    assert torch.equal(evaluate(pool, context, patches), context)


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


def test_patches_and_the_prompt_for_them_are_one_turn(pool):
    """No thread's prompt, nor an order, comes between another's patches and its prompt."""
    sets = [lora("a"), lora("b"), NO_PATCHES]

    def use(n: int) -> None:
        context = randn(1, 3, 4, seed=n % 5)
        if n % 7 == 0:
            pool.release()
        one = replace(session(pool, sets[n % 3]), settings=Settings())
        if n % 2:
            one.sample(X, torch.ones(2), sampler="euler", positive=Prompt(context))
        else:
            assert torch.equal(one.evaluate(X, torch.ones(1), Prompt(context), QUIET), context)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, range(60)))
    messages = [message for message, _ in rank(pool).messages]
    number = 0
    for message, after in zip(messages, [*messages[1:], None], strict=True):
        if isinstance(message, Patch):
            number = message.number
            assert isinstance(after, Evaluate | Sample)
        elif isinstance(message, Release):
            number = 0
        else:
            assert message.patches == number  # nothing was refused, and sent anew
