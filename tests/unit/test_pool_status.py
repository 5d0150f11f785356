"""The page shows what a pool's status has, by its names."""

import re
from pathlib import Path

import pytest
from fake_workers import FakeProcesses, FakeWorkers

from fastusp_backend.config import FileState, ModelSpec
from fastusp_backend.devices import Devices
from fastusp_backend.pool import Pool, workers
from fastusp_backend.pool import pool as pools
from fastusp_backend.pool.account import Activity
from fastusp_backend.protocol import Held

pytestmark = pytest.mark.unit

PAGES = sorted((Path(__file__).resolve().parents[2] / "web").glob("*.js"))


def test_the_page_reads_what_a_status_has(monkeypatch):
    monkeypatch.setattr(pools, "Workers", FakeWorkers)
    monkeypatch.setattr(workers, "Processes", FakeProcesses)
    spec = ModelSpec(path="/models/m", file=FileState(0, 0, 0, 0), storage=None, compute="float32")
    pool = Pool(Devices(ranks=1))
    assert pool.status()["state"] == "off"
    pool.run(
        lambda workers: workers._hear(Held(id=1, model=spec, state="resident", nbytes=9, transport="gloo", weights=""))
    )
    status = pool.status()
    pool.close()
    read = set(re.findall(r"\bpool\.(\w+)", "".join(page.read_text() for page in PAGES)))
    of_runs = Activity("sampling", 0.0, 1, 2, (0.1,)).facts().keys()
    assert read - status.keys() == {"error", "last_line", *of_runs}
    assert status.keys() - read == set()
    assert (status["starts"], status["backend"], status["transport"], status["model"]) == (1, "gloo", "gloo", "m")


def test_what_workers_that_start_have_written_last(monkeypatch):
    """Not what those before them have; nothing more once they are ready."""
    monkeypatch.setattr(pools, "Workers", FakeWorkers)
    monkeypatch.setattr(workers, "Processes", FakeProcesses)
    pool = Pool(Devices(ranks=1))
    write(pool, "of before")
    assert "last_line" not in pool.status()
    pool.stop("they were stopped from the page")
    new = pool.start()
    ready, new.ready = new.ready, None
    assert pool.status()["state"] == "starting" and "last_line" not in pool.status()
    write(pool, "importing torch")
    assert pool.status()["last_line"] == "[torchrun] importing torch"
    new.ready = ready
    assert pool.status()["state"] == "idle" and "last_line" not in pool.status()
    pool.close()


def write(pool: Pool, text: str) -> None:
    (pool.start().run_dir.path / "torchrun.log").write_text(f"{text}\n")
