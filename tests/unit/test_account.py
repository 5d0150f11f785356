"""A pool's account: whether a sampling run is under way, and the last error."""

import threading

import pytest

from fastusp_backend.errors import Cancelled, PatchesLost, PoolError, RequestError
from fastusp_backend.pool.account import Account

pytestmark = pytest.mark.unit


def test_a_run_is_under_way_until_it_ends_or_fails():
    account = Account()
    with account.run():
        with pytest.raises(ValueError), account.run():
            raise ValueError
        assert account.sampling
    assert not account.sampling


def test_runs_at_the_same_time():
    account, begun, seen = Account(), threading.Barrier(2), []

    def run():
        with account.run():
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
