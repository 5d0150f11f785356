"""A pool that is stopped starts new workers with the next request."""

import pytest

pytestmark = pytest.mark.unit


def test_the_next_request_starts_new_workers(pool):
    pool.stop("they were stopped from the page")  # of which there are none
    assert pool.status()["state"] == "off" and pool.starts == 0
    first = pool.run(lambda workers: workers)
    pool.stop("they were stopped from the page")
    assert not first.alive and pool.status()["state"] == "off" and "error" not in pool.status()
    assert pool.run(lambda workers: workers) is not first and pool.starts == 2
