"""A ControlNet's tensors travel in memory that lasts from one evaluation to the next, and goes when it should."""

import errno
from pathlib import Path

import pytest
import torch
from pools import pids
from support import SMALL, inputs, randn, relative_difference, spec_of

from fastusp_backend.config import Layout, Settings
from fastusp_backend.errors import RequestError
from fastusp_backend.models.synthetic import write_flux
from fastusp_backend.pool import Progress, Prompt, Session
from fastusp_backend.pool import pool as pools
from fastusp_backend.protocol import channel as channels
from fastusp_backend.protocol import shared

pytestmark = pytest.mark.dist

SIZE, TOKENS = (30, 34), 15 * 17
GIVEN = inputs(SMALL, text=301, size=SIZE)
PROMPT = Prompt(GIVEN.context, GIVEN.y, GIVEN.guidance)


def control(seed: int, images: int = 1) -> dict[str, list[torch.Tensor | None]]:
    one, two = (randn(images, TOKENS, SMALL.hidden, seed=seed + n) for n in range(2))
    return {"input": [one, two], "output": [None, one]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("lasting") / "model"
    write_flux(str(path), SMALL, seed=4)
    return spec_of(path)


@pytest.fixture
def session(shared_pool, model):
    shared_pool(2).start()
    shared_pool(2).release()
    return Session(shared_pool(2), model, (Layout(ulysses=2, ring=1),), Settings())


def evaluate(session: Session, residuals) -> torch.Tensor:
    return session.evaluate(GIVEN.x, GIVEN.timestep, PROMPT, Progress(), residuals)


def mapped(pool) -> list[int]:
    """How many pieces of shared memory each rank maps."""
    return [Path(f"/proc/{pid}/maps").read_text().count("memfd:fastusp") for pid in pids(pool)]


def test_it_carries_every_evaluation_and_is_mapped_once(session, model, shared_pool, monkeypatch):
    first = evaluate(session, control(0))
    lasting = session.pool._workers.channel._lasting
    others = [evaluate(session, control(seed)) for seed in (10, 20)]
    assert torch.equal(evaluate(session, control(0)), first)  # the prompt, which came with the first ones, is as it was
    assert session.pool._workers.channel._lasting is lasting and mapped(session.pool) == [1, 1]
    one = Session(shared_pool(1), model, (Layout(ulysses=1, ring=1),), Settings())
    for seed, got in zip((0, 10, 20), (first, *others), strict=True):
        assert relative_difference(got, evaluate(one, control(seed))) < 2e-5
    monkeypatch.setattr(channels, "INLINE_LIMIT", 1 << 40)
    assert torch.equal(evaluate(session, control(10)), others[0])


def test_memory_that_may_be_read_still_is_not_written_to(session):
    first = evaluate(session, control(0))
    workers = session.pool._workers
    lasting, workers._unread = workers.channel._lasting, workers.sent + 1
    assert torch.equal(evaluate(session, control(0)), first)
    assert workers.channel._lasting is not lasting and workers._unread == workers.answered
    del lasting
    assert mapped(session.pool) == [1, 1]


def test_what_was_refused_is_followed_by_what_is_right(session):
    first = evaluate(session, control(0))
    with pytest.raises(RequestError, match="a ControlNet's tensor"):
        evaluate(session, control(0, images=3))
    assert torch.equal(evaluate(session, control(0)), first)


def test_it_goes_when_a_run_has_ended_unless_it_is_small(session, monkeypatch):
    first = evaluate(session, control(0))
    session.settle()
    assert mapped(session.pool) == [1, 1]
    monkeypatch.setattr(pools, "KEPT_BYTES", 0)
    session.settle()
    assert mapped(session.pool) == [0, 0] and session.pool._workers.channel.lasting_bytes == 0
    assert torch.equal(evaluate(session, control(0)), first) and mapped(session.pool) == [1, 1]


def test_it_goes_with_the_model(session):
    evaluate(session, control(0))
    session.pool.release()
    assert mapped(session.pool) == [0, 0]


def test_memory_that_the_host_does_not_give_harms_no_workers(session, monkeypatch):
    expected, before = evaluate(session, control(0)), pids(session.pool)
    session.pool.release()

    def none_left(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(shared.os, "memfd_create", none_left)
        with pytest.raises(RequestError, match="shared memory for .* cannot be allocated: .*Too many open files.*ulimit -n"):
            evaluate(session, control(0))
    assert torch.equal(evaluate(session, control(0)), expected) and pids(session.pool) == before
