"""A pool's account: whether a sampling run is under way, the last runs, the last error."""

import threading
from types import SimpleNamespace

import pytest

from fastusp_backend.errors import Cancelled, PatchesLost, PoolError, RequestError
from fastusp_backend.pool import Progress
from fastusp_backend.pool.account import RUNS, Account
from fastusp_backend.protocol import Done

pytestmark = pytest.mark.unit


def test_a_run_is_under_way_until_it_ends_or_fails():
    account = Account()
    with account.run({}):
        with pytest.raises(ValueError), account.run({}):
            raise ValueError
        assert account.sampling
    assert not account.sampling


def test_runs_at_the_same_time():
    account, begun, seen = Account(), threading.Barrier(2), []

    def run():
        with account.run({}):
            begun.wait()
        begun.wait()
        seen.append(account.sampling)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [False, False]


@pytest.mark.parametrize("error", [RequestError("refused"), PatchesLost("twice"), PoolError("died")])
def test_an_error_is_kept(error):
    account = Account()
    with pytest.raises(type(error)), account.request():
        raise error
    assert account.error == str(error)


@pytest.mark.parametrize("error", [Cancelled("so wanted"), KeyboardInterrupt(), ValueError("?")])
def test_what_is_no_error_of_the_pool(error):
    account = Account()
    with pytest.raises(type(error)), account.request():
        raise error
    assert account.error is None


def test_how_far_a_run_is():
    heard, account = [], Account()
    progress = account.following(Progress(step=lambda event, _: heard.append(event.index), phase=heard.append))
    with account.request():
        progress.phase("loading the model")
        assert account.activity.facts().keys() == {"phase", "phase_seconds"}
        assert account.activity.facts()["phase"] == "loading the model"
        for index, seconds in enumerate((9.0, 0.1, 0.1, 0.1)):
            progress.step(SimpleNamespace(index=index, total=10, seconds=seconds), {})
        facts = account.activity.facts()
        assert facts["phase"] == "sampling" and (facts["step"], facts["steps"]) == (4, 10)
        assert (facts["ms_per_step"], facts["seconds_left"]) == (100.0, 0.6)
    assert account.activity is None
    assert heard == ["loading the model", 0, 1, 2, 3]


def test_the_last_runs(monkeypatch):
    """With the time of each of their parts; a run steps by several requests, whose steps somebody else counts."""
    account, clock = Account(), iter(range(1000))
    monkeypatch.setattr("fastusp_backend.pool.account.time.monotonic", lambda: next(clock))
    progress = account.following(Progress())
    for number in range(RUNS + 2):
        with account.run({"number": number}):
            with account.request():
                progress.phase("loading the model")
            account.stepped(0, 3, None)
            assert account.activity.facts().keys() == {"phase", "phase_seconds", "step", "steps"}
            with account.request():
                account.stepped(1, 3, 0.2)
            assert account.activity.facts()["ms_per_step"] == 200.0
            account.stepped(2, 3, 0.2)
        assert account.activity is None
    assert [run["number"] for run in account.history] == [*range(RUNS + 1, 1, -1)]
    last = account.history[0]
    assert (last["steps"], last["ms_per_step"]) == (3, 200.0)
    assert [*last["phases"]] == ["loading the model", "sampling"] and sum(last["phases"].values()) <= last["seconds"]


def test_a_step_of_a_run_that_may_skip_some_has_no_time():
    """Neither those that are skipped nor those that are not say what the others take."""
    account = Account()
    with account.run({}):
        progress = account.following(Progress(), cached=True)
        for index, seconds in enumerate((9.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1)):
            progress.step(SimpleNamespace(index=index, total=10, seconds=seconds), {})
        facts = account.activity.facts()
        assert "ms_per_step" not in facts and facts["seconds_left"] == 1.2
        progress.done(Done(id=1, evaluations=10, skipped=6))
    last = account.history[0]
    assert (last["ms_per_step"], last["evaluations"], last["skipped"]) == (None, 10, 6)
    with account.run({}):
        account.stepped(0, 1, 0.1)
    assert (account.history[0]["evaluations"], account.history[0]["ms_per_step"]) == (0, 100.0)


@pytest.mark.parametrize("error", [RequestError("refused"), Cancelled("so wanted")])
def test_a_run_that_fails_is_no_part_of_the_history(error):
    account = Account()
    with pytest.raises(type(error)), account.run({}):
        account.stepped(0, 2, 0.1)
        raise error
    assert account.activity is None and not account.history
