"""Workers that stand still or loop are found, named and replaced, and Stop is heard meanwhile."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from pools import GIVEN, LONG, PROMPT, SHORT, Stopwatch, evaluate, pids, processes_of, run_dir, sample, session
from support import SMALL, inputs, wait_until

from fastusp_backend.errors import Cancelled, PoolError
from fastusp_backend.pool import Pool, Progress, hangs, workers
from fastusp_backend.pool import request as requests
from fastusp_backend.prompt import Prompt
from fastusp_backend.protocol import channel

pytestmark = pytest.mark.dist


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(hangs, "STOPPED_SECONDS", 1.5)


@pytest.fixture
def right(mortal, dev, impatient):
    """What comes before the test comes after it too, from other workers."""
    expected, before, directory = evaluate(mortal, dev), pids(mortal), run_dir(mortal)
    yield
    assert torch.equal(evaluate(mortal, dev), expected)
    assert not set(pids(mortal)) & set(before) and not directory.exists() and not processes_of(directory)
    assert mortal.status()["state"] == "idle" and "error" not in mortal.status()


def in_step(victim: int, number: int, pool: Pool):
    """A Progress that signals a rank in its third step. watches: from then on."""
    watches = []

    def step(event, tensors):
        if event.index == 2:
            os.kill(pids(pool)[victim], number)
            watches.append(Stopwatch())

    return Progress(step=step), watches


def test_a_rank_that_is_stopped_while_it_starts(mortal, dev, impatient):
    if mortal._workers is not None:
        mortal._workers.kill()
    mortal.start()
    shown = Path(run_dir(mortal)) / "pulse-0"
    wait_until(shown.exists, 60)
    os.kill(int.from_bytes(shown.read_bytes()[16:24], "little"), signal.SIGSTOP)
    watch = Stopwatch()
    with pytest.raises(Cancelled):
        sample(mortal, dev, progress=Progress(interrupted=lambda: watch.seconds > 0.3))
    with pytest.raises(PoolError, match="did not start: rank 0 .* was stopped"):
        sample(mortal, dev)
    assert watch.seconds < 10
    assert sample(mortal, dev).isfinite().all()


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.thorough), 1])
def test_a_rank_that_is_stopped_in_a_step(mortal, dev, right, victim):
    pid = pids(mortal)[victim]
    progress, watches = in_step(victim, signal.SIGSTOP, mortal)
    with pytest.raises(PoolError) as failure:
        sample(mortal, dev, LONG, progress)
    assert watches[0].seconds < 10
    text = str(failure.value)
    assert f"stopped while a prompt ran: rank {victim} (process {pid}) was stopped (SIGSTOP, Ctrl-Z) while it" in text
    assert f"Rank {victim} was in:\n  File" in text and "fastusp_backend/" in text
    assert "The next prompt starts new ones" in text and mortal.status()["error"] == text
    assert mortal.status()["state"] == "off"


def test_a_rank_that_loops_in_a_step(mortal, dev, right):
    """With the true limits: a step of these takes milliseconds."""
    pid = pids(mortal)[1]
    progress, watches = in_step(1, signal.SIGUSR2, mortal)
    with pytest.raises(PoolError) as failure:
        sample(mortal, dev, LONG, progress)
    assert watches[0].seconds < 15
    text = str(failure.value)
    assert f"rank 1 (process {pid}) made no progress for 12 s while it evaluated the model" in text
    assert "Rank 1 was in:\n  File" in text and "in loop" in text


def test_stop_and_the_next_prompts(mortal, dev, right, monkeypatch, caplog):
    """The first is stopped too, while it waits; what hangs at a prompt that was stopped is no error of the second.
    Rank 0 hangs: of another it may not know yet, and answer."""
    monkeypatch.setattr(requests, "CANCEL_SECONDS", 0.2)
    progress, watches = in_step(0, signal.SIGSTOP, mortal)
    stopping = Progress(step=progress.step, interrupted=lambda: bool(watches))
    with pytest.raises(Cancelled):
        sample(mortal, dev, LONG, stopping)
    with pytest.raises(Cancelled, match="before the workers had the request"):
        sample(mortal, dev, progress=Progress(interrupted=lambda: True))
    assert watches[0].seconds < 1.5 and mortal.status()["state"] == "stopping"
    phases = []
    sample(mortal, dev, progress=Progress(phase=phases.append))
    assert phases[:2] == ["waiting for the workers", "starting 2 worker(s) on cpu:2"]
    assert "stopped before a prompt ran: rank 0 (process" in caplog.text


@pytest.mark.thorough
def test_ranks_that_end_at_what_was_stopped_while_torchrun_does_not_see_it(mortal, dev, right, monkeypatch):
    """No answer comes: the next prompt does not wait for one."""
    monkeypatch.setattr(requests, "CANCEL_SECONDS", 0.0)
    monkeypatch.setattr(workers, "DEATH_SECONDS", 0.2)
    progress, watches = in_step(0, signal.SIGSTOP, mortal)
    with pytest.raises(Cancelled):
        sample(mortal, dev, LONG, Progress(step=progress.step, interrupted=lambda: bool(watches)))
    os.kill(mortal._workers.processes.torchrun.pid, signal.SIGSTOP)
    for pid in pids(mortal):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: mortal.status()["state"] != "stopping", 5)


def test_stop_is_heard_while_a_request_is_sent(mortal, dev, right, monkeypatch):
    """Rank 0 does not read, and the tensors, inline, are more than the socket takes."""
    monkeypatch.setattr(requests, "CANCEL_SECONDS", 0.2)
    monkeypatch.setattr(channel, "INLINE_LIMIT", 1 << 30)
    large = inputs(SMALL, text=20_000, size=(8, 6))
    os.kill(pids(mortal)[0], signal.SIGSTOP)
    watch, asked = Stopwatch(), []

    def interrupted():
        asked.append(watch.seconds)
        return asked[-1] > 0.3

    with pytest.raises(Cancelled):
        session(mortal, dev).evaluate(
            large.x, large.timestep, Prompt(large.context, large.y, large.guidance), Progress(interrupted=interrupted)
        )
    assert watch.seconds < 1.5 and mortal.status()["state"] == "stopping"
    wait_until(lambda: mortal.status()["state"] == "off", 10)  # found though nobody asks
    assert "was stopped" in mortal.status()["error"]


def test_stop_is_heard_while_what_was_taken_back_is_not_answered(mortal, dev):
    """Another pack is found while the ranks load weights: they hear no cancel, as where one stands still. The next
    prompt waits for them, and is right."""
    expected, before = sample(mortal, dev), pids(mortal)
    mortal.release()
    watches = []

    def found():
        os.kill(before[1], signal.SIGSTOP)
        watches.append(Stopwatch())
        raise LookupError("another pack")

    progress = Progress(interrupted=lambda: bool(watches) and watches[0].seconds > 0.3)
    try:
        with pytest.raises(LookupError, match="another pack"):
            session(mortal, dev).sample(
                GIVEN.x, SHORT, sampler="euler", positive=PROMPT, progress=progress, meanwhile=found
            )
        with pytest.raises(Cancelled):  # what ComfyUI's sampler would go on with
            one_evaluation(mortal, dev, progress)
        assert watches[0].seconds < 1.3 and mortal.status()["state"] == "stopping"
    finally:
        os.kill(before[1], signal.SIGCONT)
    assert torch.equal(sample(mortal, dev), expected) and pids(mortal) == before


@pytest.mark.thorough
def test_an_order_that_hung_workers_do_not_follow(mortal, dev, right):
    os.kill(pids(mortal)[1], signal.SIGSTOP)
    with pytest.raises(PoolError, match="stopped while no prompt ran: rank 1 .* was stopped"):
        mortal.release()
    assert not mortal.busy


def test_stop_is_heard_by_who_waits_for_another_thread(mortal, dev):
    """One that hangs until it is found."""
    evaluate(mortal, dev)
    started = threading.Event()
    going = True

    def first():
        with pytest.raises(Cancelled):
            sample(mortal, dev, LONG, Progress(step=lambda *_: started.set(), interrupted=lambda: not going))

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert started.wait(20)
        for ask in (lambda p: sample(mortal, dev, progress=p), lambda p: one_evaluation(mortal, dev, p)):
            watch = Stopwatch()
            with pytest.raises(Cancelled):
                ask(Progress(interrupted=lambda watch=watch: watch.seconds > 0.2))
            assert watch.seconds < 1
    finally:
        going = False
        thread.join()


def one_evaluation(pool, dev, progress):
    return session(pool, dev).evaluate(GIVEN.x, GIVEN.timestep, PROMPT, progress)


def test_ctrl_c_leaves_no_half_frame(mortal, dev):
    """It comes wherever the main thread is; the workers stay, and the next prompt is right."""
    expected, before = sample(mortal, dev), pids(mortal)
    for n in range(12):
        timer = threading.Timer(0.002 + 0.004 * n, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises((KeyboardInterrupt, Cancelled)):
            timer.start()  # on a busy machine it may fire before this returns
            late = time.monotonic() + 60
            while time.monotonic() < late:
                sample(mortal, dev)
            pytest.fail(f"nobody was told of interrupt {n}, and prompts go on: no worker hangs")
        timer.join()
        time.sleep(0.01)
    assert torch.equal(sample(mortal, dev), expected) and pids(mortal) == before
