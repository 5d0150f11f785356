"""Weights leave the devices and come back, for every layout alike; memory that is too small is said, and survived."""

import contextlib
import os
import resource
import signal

import pytest
import torch
from pools import GIVEN, LONG, PROMPT, evaluate, pids, sample, session
from support import REORDERED, SMALL, inputs, relative_difference, spec_of, wait_until

from fastusp_backend.config import Layout
from fastusp_backend.errors import Cancelled, RequestError
from fastusp_backend.models.files import read_model
from fastusp_backend.models.placement import place_file
from fastusp_backend.pool import Progress
from fastusp_backend.pool import request as requests
from fastusp_backend.prompt import Prompt

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def pool(mortal):
    return mortal


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(3, marks=pytest.mark.thorough)])
def test_parked_weights_come_back_as_they_were(shared_pool, park, dev, schnell, ranks):
    pool, layout = shared_pool(ranks), Layout(ulysses=1, ring=ranks)
    mapped = evaluate(pool, dev, layout)
    loaded, header = pool.held, read_model(str(dev)).header
    assert (loaded.state, loaded.model.path) == ("resident", str(dev))
    everything, most = (place_file(header, spec_of(dev), n).device_bytes for n in (1, ranks))
    modulations = sum(info.size for key, info in header.items() if "mod" in key)
    largest = max(info.size for key, info in header.items() if "mod" in key)
    assert everything == sum(info.size for info in header.values())
    assert loaded.nbytes == most and abs(everything - modulations + modulations / ranks - most) < largest
    parked = most - (everything - modulations) * (1 - 1 / ranks)
    park(pool)
    before = evaluate(pool, dev, layout)
    assert relative_difference(before, mapped) < REORDERED
    for _ in range(2):
        park(pool)
        pool.park()
        assert pool.held.state == "parked" and pool.held.model == loaded.model
        assert parked <= pool.held.nbytes < parked + 1e5
        phases = []
        again = session(pool, dev, layout).evaluate(GIVEN.x, GIVEN.timestep, PROMPT, Progress(phase=phases.append))
        assert torch.equal(again, before) and phases == ["bringing the weights back"]
        assert pool.held.state == "resident"
    park(pool)
    evaluate(pool, schnell, layout)  # another model takes the place of the parked one
    assert pool.held.model.path == str(schnell)
    assert torch.equal(evaluate(pool, dev, layout), mapped)


def test_residency_is_seen_to_after_a_run(pool, dev):
    want = sample(pool, dev)
    for residency, state, phase, bound in (
        ("park", "parked", "bringing the weights back", REORDERED),
        ("release", "none", "loading the model", 0.0),
        ("keep", "resident", None, 0.0),
    ):
        over = session(pool, dev, residency=residency)
        over.after_run()
        assert pool.held.state == state and bool(over.resident_bytes()) == (residency == "keep")
        assert pool.status()["held"] == state
        phases = []
        got = sample(pool, dev, progress=Progress(phase=phases.append))
        assert relative_difference(got, want) <= bound
        assert phases == ([phase] if phase else [])


@pytest.mark.parametrize(("residency", "state"), [("keep", "none"), ("park", "parked"), ("release", "none")])
def test_who_needs_the_room_gets_it(pool, dev, residency, state):
    evaluate(pool, dev)
    session(pool, dev, residency=residency).evict()
    assert pool.held.state == state


def test_a_change_of_residency_makes_no_new_evaluation(pool, dev):
    kept = [
        session(pool, dev, residency=residency)._what(1, 0)["settings"] for residency in ("keep", "park", "release")
    ]
    assert len(set(kept)) == 1


def test_a_cancelled_run_can_be_parked(pool, dev):
    with pytest.raises(Cancelled):
        sample(pool, dev, LONG, Progress(interrupted=lambda: True))
    pool.park()
    assert sample(pool, dev).isfinite().all()


@pytest.fixture
def halted(pool, dev, monkeypatch):
    """A context in which rank 1 stands still, so that what is cancelled is left behind."""
    evaluate(pool, dev)
    monkeypatch.setattr(requests, "CANCEL_SECONDS", 0.0)

    @contextlib.contextmanager
    def context():
        os.kill(pids(pool)[1], signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pids(pool)[1], signal.SIGCONT)

    return context


def leave_behind(pool, dev) -> None:
    with pytest.raises(Cancelled, match="will come to it"):
        sample(pool, dev, LONG, Progress(interrupted=lambda: True))


def test_weights_that_come_after_a_cancel_are_known(pool, dev, halted):
    pool.release()
    with halted():
        leave_behind(pool, dev)
        assert pool.held.state == "none"
    wait_until(lambda: pool.held.state == "resident" and not pool._workers.behind, 20)
    assert session(pool, dev).resident_bytes() and not pool.busy
    pool.park()
    assert pool.held.state == "parked"


@pytest.mark.parametrize(("residency", "state"), [("park", "parked"), ("release", "none")])
def test_weights_that_come_after_a_cancel_leave_again(pool, dev, halted, residency, state):
    """Nobody waits for it."""
    over = session(pool, dev, residency=residency)
    pool.release()
    with halted():
        leave_behind(pool, dev)
        over.after_run()
    wait_until(lambda: pool.held.state == state and not pool._workers.behind, 20)
    assert sample(pool, dev).isfinite().all()


def address_space(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


@pytest.fixture
def cramped(pool, dev):
    """cramped(rank, spare): from now on that rank's process gets `spare` bytes at most, or 64 MB more where one of its
    allocator's arenas goes meanwhile."""
    evaluate(pool, dev)
    limited = []

    def limit(rank: int, spare: int) -> None:
        pid, sizes = pids(pool)[rank], []

        def steady() -> bool:  # rank 0 answers for all: others may still give memory back
            sizes.append(address_space(pid))
            return len(sizes) > 5 and len(set(sizes[-5:])) == 1

        wait_until(steady, 10)
        limited.append((pid, resource.prlimit(pid, resource.RLIMIT_AS)))
        resource.prlimit(pid, resource.RLIMIT_AS, (address_space(pid) + spare, limited[-1][1][1]))

    def lift() -> None:
        while limited:
            resource.prlimit(limited[-1][0], resource.RLIMIT_AS, limited.pop()[1])

    limit.lift = lift
    yield limit
    lift()


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.thorough), 1])
def test_an_evaluation_that_does_not_fit_is_refused(pool, dev, cramped, rank):
    large = inputs(SMALL, text=7, size=(128, 96), batch=2)
    prompt = Prompt(large.context, large.y, large.guidance)
    expected, before = evaluate(pool, dev), pids(pool)
    cramped(rank, 20_000_000)
    with pytest.raises(RequestError) as error:
        session(pool, dev).evaluate(large.x, large.timestep, prompt, Progress())
    cramped.lift()
    text = str(error.value)
    assert f"rank {rank} (cpu" in text and "ran out of memory while it made room for an evaluation" in text
    assert "it asked for" in text and "GB of weights" in text and "smaller image or batch" in text
    assert pool.held.state == "resident"
    assert relative_difference(evaluate(pool, dev), expected) < 2e-5
    assert session(pool, dev).evaluate(large.x, large.timestep, prompt, Progress()).isfinite().all()
    assert pids(pool) == before


@pytest.mark.thorough
def test_the_modulations_of_many_steps_that_do_not_fit_are_refused(pool, dev, cramped):
    """Their evaluations would: 32 rows for 64 images take 134 MB."""
    many = inputs(SMALL, text=2, size=(2, 2), batch=64)
    prompt = Prompt(many.context, many.y, many.guidance)

    def run(steps: int) -> torch.Tensor:
        sigmas = torch.linspace(1, 0, steps + 1)
        return session(pool, dev).sample(many.x, sigmas, sampler="euler", positive=prompt)

    few, before = run(2), pids(pool)
    cramped(0, 20_000_000)
    with pytest.raises(RequestError, match="rank 0 .* ran out of memory while it made room for an evaluation"):
        run(32)
    assert torch.equal(run(2), few)
    cramped.lift()
    assert run(32).isfinite().all() and pids(pool) == before


def test_weights_that_do_not_fit_are_refused_and_loaded_later(pool, dev, cramped):
    expected, before = evaluate(pool, dev), pids(pool)
    loaded = address_space(before[1])
    pool.release()
    wait_until(lambda: address_space(before[1]) < loaded - 50_000_000, 10)  # rank 0 answers for all
    cramped(1, 20_000_000)
    with pytest.raises(RequestError, match="rank 1 .* ran out of memory while it loaded the model"):
        evaluate(pool, dev)
    cramped.lift()
    assert pool.held.state == "none"
    assert relative_difference(evaluate(pool, dev), expected) < 2e-5
    assert pids(pool) == before
