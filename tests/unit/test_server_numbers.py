"""Two clients may give the same numbers: the workers never meet one twice, and keep nothing that nobody uses."""

import pytest
import torch
from channels import WHAT

from fastusp_backend.errors import RequestError
from fastusp_backend.protocol import Evaluate, Patch, Release, Sample
from fastusp_backend.server import numbers
from fastusp_backend.server.numbers import ClientNumbers, WorkerNumbers

pytestmark = pytest.mark.unit


@pytest.fixture
def workers():
    return WorkerNumbers()


def evaluate(client: ClientNumbers, number: int = 7, **given) -> Evaluate:
    """With a tensor of 4 bytes for each that is to be kept."""
    tensors = {name: torch.zeros(1) for name in given.get("keep", ())}
    return client.translate(Evaluate(id=1, **WHAT, **given), tensors, number)


def test_tensors(workers):
    one, other = ClientNumbers(workers), ClientNumbers(workers)
    first = evaluate(one, keep={"context": 0, "y": 1})
    second = evaluate(other, keep={"context": 0})
    assert first.id == 7 and first.keep == {"context": 0, "y": 1} and second.keep == {"context": 2}
    again = evaluate(one, reuse={"y": 1}, forget=[0, 5])
    assert again.reuse == {"y": 1} and again.forget == [0]
    assert evaluate(other, reuse={"context": 0}).reuse == {"context": 2}
    with pytest.raises(RequestError, match="'context' was never sent"):
        evaluate(one, reuse={"context": 0})


def test_what_a_client_leaves_behind_is_forgotten(workers):
    one, other = ClientNumbers(workers), ClientNumbers(workers)
    evaluate(one, keep={"context": 0, "y": 1})
    one.leave()
    assert evaluate(other).forget == [0, 1] and evaluate(other).forget == []


def test_one_that_leaves_while_it_is_served_leaves_nothing(workers):
    one, other = ClientNumbers(workers), ClientNumbers(workers)
    evaluate(one, keep={"context": 0})
    one.leave()
    with pytest.raises(RequestError, match="its ComfyUI is gone"):
        evaluate(one, keep={"context": 1})
    assert evaluate(other).forget == [0] and evaluate(other).forget == []


def test_what_is_refused_changes_nothing(workers):
    """What was to be forgotten is so by the next one."""
    one, other = ClientNumbers(workers), ClientNumbers(workers)
    evaluate(one, keep={"context": 0})
    evaluate(other, keep={"context": 0})
    other.leave()
    with pytest.raises(RequestError, match="was never sent"):
        evaluate(one, keep={"y": 1}, forget=[0], reuse={"context": 5})
    assert evaluate(one, reuse={"context": 0}).forget == [1]


def test_a_number_that_is_given_again_keeps_one_tensor(workers):
    one = ClientNumbers(workers)
    evaluate(one, keep={"context": 0})
    again = evaluate(one, keep={"context": 0})
    assert again.keep == {"context": 1} and again.forget == [0]


def test_no_more_is_kept_than_may_be(workers, monkeypatch):
    one = ClientNumbers(workers)
    for number in range(numbers.MOST_TENSORS):
        evaluate(one, keep={"context": number})
    with pytest.raises(RequestError, match=f"^Use shorter prompts, .* was to keep {numbers.MOST_TENSORS + 1} of"):
        evaluate(one, keep={"context": 99})
    assert evaluate(one, keep={"context": 99}, forget=[0]).forget == [0]
    monkeypatch.setattr(numbers, "MOST_BYTES", 7)
    other = ClientNumbers(workers)
    evaluate(other, keep={"context": 0})
    with pytest.raises(RequestError, match="^Use shorter prompts"):
        evaluate(other, keep={"y": 1})


def test_patch_sets(workers):
    one, other = ClientNumbers(workers), ClientNumbers(workers)

    def patch(client: ClientNumbers, number: int, base: int | None) -> tuple:
        sent = client.translate(Patch(id=1, model=WHAT["model"], number=number, base=base, weights={}), {}, 3)
        return sent.id, sent.number, sent.base

    assert patch(one, 1, 0) == (3, 1, 0) and patch(other, 1, None) == (3, 2, None) and patch(other, 2, 1) == (3, 3, 2)
    given = {"sampler": "euler", "options": {}, "timestep_scale": 1.0, "cfg": 1.0}
    assert one.translate(Sample(id=1, **WHAT, **given, patches=1), {}, 4).patches == 1
    assert evaluate(other, patches=2).patches == 3 and evaluate(other).patches == 0
    assert one.translate(Release(id=1), {}, 9) == Release(id=9)
    assert evaluate(other, patches=1).patches > 3  # no weights have it any more
    for number in range(3, 99):
        patch(other, number, number - 1)
    assert len(other._patches) == 3
