"""A pool whose workers have no processes (`fake_workers`), and what tests send it."""

import pytest
from fake_workers import FakeProcesses, FakeWorkers, rank

from fastusp_backend.devices import Devices
from fastusp_backend.errors import Cancelled, ProtocolError, RequestError
from fastusp_backend.pool import Pool, Progress, request, workers
from fastusp_backend.pool import pool as pools
from fastusp_backend.protocol import Evaluate


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(pools, "Workers", FakeWorkers)
    monkeypatch.setattr(workers, "Processes", FakeProcesses)
    monkeypatch.setattr(FakeWorkers, "script", [])
    monkeypatch.setattr(request, "CANCEL_SECONDS", 0.0)
    pool = Pool(Devices(ranks=1))
    yield pool
    pool.close()


def names_sent(pool) -> list[set[str]]:
    return [names for message, names in rank(pool).messages if isinstance(message, Evaluate)]


ENDINGS = {
    "refused": (RequestError, "it was refused"),
    "cancelled": (Cancelled, "was cancelled"),
    "misread": (ProtocolError, "refused a message"),
    "interrupted": (KeyboardInterrupt, None),
    "late": (Cancelled, "will come to it"),
}


def stopping(pool, ending: str) -> Progress:
    """Stops what is not answered; and the workers come to it when the next prompt waits for them."""
    rank_now = rank(pool)
    return Progress(interrupted=lambda: ending == "late" and bool(rank_now._late))


def waiting(pool) -> Progress:
    rank_now = rank(pool)
    return Progress(phase=lambda text: rank_now.catch_up())
