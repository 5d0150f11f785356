"""Which patches the workers' weights have: a change travels once, and what is in doubt is made anew."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import msgspec
import pytest
import torch
from fake_pool import ENDINGS, names_sent, stopping, waiting
from fake_workers import SPEC, X, evaluate, lora, rank, script, session
from support import randn, wait_until

from fastusp_backend.config import Settings
from fastusp_backend.errors import PatchesLost
from fastusp_backend.pool import NO_PATCHES, WeightPatches
from fastusp_backend.pool.progress import QUIET
from fastusp_backend.prompt import Prompt
from fastusp_backend.protocol import Evaluate, Patch, Release, Sample

pytestmark = pytest.mark.unit


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
def test_patches_in_doubt_are_taken_out(pool, ending):
    """Where the next prompt wants none."""
    context = torch.zeros(1, 3, 4)
    evaluate(pool, context)
    script(ending)
    with pytest.raises(ENDINGS[ending][0]):
        evaluate(pool, context, lora("a"), stopping(pool, ending))
    evaluate(pool, context, progress=waiting(pool))
    change = rank(pool).sent(Patch)[-1]
    assert (change.base, change.weights, change.number) == (None, {}, 0) and rank(pool).patches == 0


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
