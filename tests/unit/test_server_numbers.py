"""Two clients may give the same numbers: the workers never meet one twice."""

import pytest
from channels import WHAT

from fastusp_backend.errors import RequestError
from fastusp_backend.protocol import Evaluate, Patch, Release, Sample
from fastusp_backend.server.numbers import ClientNumbers, WorkerNumbers

pytestmark = pytest.mark.unit


@pytest.fixture
def workers():
    return WorkerNumbers()


def evaluate(client: ClientNumbers, number: int = 7, **given) -> Evaluate:
    return client.translate(Evaluate(id=1, **WHAT, **given), number)


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


def test_patch_sets(workers):
    one, other = ClientNumbers(workers), ClientNumbers(workers)

    def patch(client: ClientNumbers, number: int, base: int | None) -> tuple:
        sent = client.translate(Patch(id=1, model=WHAT["model"], number=number, base=base, weights={}), 3)
        return sent.id, sent.number, sent.base

    assert patch(one, 1, 0) == (3, 1, 0) and patch(other, 1, None) == (3, 2, None) and patch(other, 2, 1) == (3, 3, 2)
    given = {"sampler": "euler", "options": {}, "timestep_scale": 1.0, "cfg": 1.0}
    assert one.translate(Sample(id=1, **WHAT, **given, patches=1), 4).patches == 1
    assert evaluate(other, patches=1).patches == 2 and evaluate(other).patches == 0
    assert one.translate(Release(id=1), 9) == Release(id=9)
