"""Tensors to compute from travel in memory that lasts from one request to the next, and goes when it should."""

import errno
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pools import pids
from support import REORDERED, SMALL, inputs, randn, relative_difference, spec_of

from fastusp_backend.config import Layout, Settings, WeightPatch
from fastusp_backend.errors import ProtocolError, RequestError
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import Progress, Session, WeightPatches, name_of
from fastusp_backend.pool import pool as pools
from fastusp_backend.prompt import Prompt
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
    write_checkpoint(str(path), SMALL, seed=4)
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


def test_it_carries_every_sampling_run(session, monkeypatch):
    """Fresh pages for a prompt of 8 MB would take longer than its copying, in the sender and in each rank."""
    monkeypatch.setattr(channels, "INLINE_LIMIT", 1 << 16)

    def sample(seed: int) -> torch.Tensor:
        noise = randn(*GIVEN.x.shape, seed=seed)
        return session.sample(noise, torch.linspace(1, 0, 3), sampler="euler", positive=PROMPT)

    first = sample(0)
    lasting = session.pool._workers.channel._lasting
    others = [sample(1), evaluate(session, None), sample(2)]
    assert session.pool._workers.channel._lasting is lasting and mapped(session.pool) == [1, 1]
    assert torch.equal(sample(0), first) and torch.equal(sample(2), others[2])


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
    session.after_run()
    assert mapped(session.pool) == [1, 1]
    monkeypatch.setattr(pools, "KEPT_BYTES", 0)
    session.after_run()
    evaluate(session, None)  # by which all ranks have done what rank 0 answered
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
        with pytest.raises(
            RequestError, match="shared memory for .* cannot be allocated: .*Too many open files.*ulimit -n"
        ):
            evaluate(session, control(0))
    assert torch.equal(evaluate(session, control(0)), expected) and pids(session.pool) == before


@pytest.fixture
def full(session):
    """full(rank): it may open no more files, until the test has ended or `full(None)`."""
    limited = []

    def limit(rank: int | None) -> None:
        while limited:
            resource.prlimit(limited[-1][0], resource.RLIMIT_NOFILE, limited[-1][1])
            limited.pop()
        if rank is not None:
            pid = pids(session.pool)[rank]
            numbers = {int(fd) for fd in os.listdir(f"/proc/{pid}/fd")}
            free = next(n for n in range(len(numbers) + 1) if n not in numbers)
            limited.append((pid, resource.prlimit(pid, resource.RLIMIT_NOFILE)))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, limited[-1][1][1]))

    yield limit
    limit(None)


@pytest.mark.parametrize(
    "rank, kind",
    [
        (0, "evaluation"),
        (1, "sampling"),
        pytest.param(1, "evaluation", marks=pytest.mark.thorough),
        pytest.param(1, "patches", marks=pytest.mark.thorough),
    ],
)
def test_a_rank_with_too_many_open_files_harms_no_workers(session, full, monkeypatch, rank, kind):
    """The request is refused, on all ranks, and the next one finds what it needs."""
    up, down = randn(SMALL.hidden, 80, seed=1), randn(80, 64, seed=2)
    patch = WeightPatch(kind="lora", tensors={"up": name_of(up), "down": name_of(down)}, strength=0.1)
    patched = WeightPatches({"img_in.weight": (patch,)}, {name_of(up): up, name_of(down): down})
    changed = replace(session, patches=patched) if kind == "patches" else session

    def run():
        if kind == "sampling":
            guided = {"positive": PROMPT, "negative": PROMPT, "cfg": 2.0}  # more than what was sent before
            return session.sample(GIVEN.x, torch.linspace(1, 0, 3), sampler="euler", **guided)
        return evaluate(changed, None if kind == "patches" else control(0))

    monkeypatch.setattr(channels, "INLINE_LIMIT", 1 << 16)
    evaluate(session, control(5))
    before = pids(session.pool)
    session.pool.release()
    evaluate(session, None)
    full(rank)
    wanted = (
        "message: a frame's shared memory.*too many files" if rank == 0 else "^rank 1: .*memory.*Too many open files"
    )
    for _ in range(2):  # the second time in memory that was sent before, were it believed to have arrived
        with pytest.raises((RequestError, ProtocolError), match=f"{wanted}.*ulimit -n"):
            run()
    full(None)
    got = run()
    assert pids(session.pool) == before
    session.pool.release()
    assert relative_difference(got, run()) < REORDERED
