"""A rank that fails ends at once, also where it can leave no trace: one that lived on would do nothing any more. One
that was told to leaves nothing that others wait for."""

from unittest.mock import MagicMock

import pytest

from fastusp_backend.worker import __main__ as worker
from fastusp_backend.worker import control, rank
from fastusp_backend.worker.process import PARENT_VARIABLE, RUN_DIR_VARIABLE

pytestmark = pytest.mark.unit


class Ended(BaseException):
    pass


@pytest.fixture
def exits(monkeypatch):
    """The exit codes with which this process would have ended."""
    codes = []

    def leave(code):
        codes.append(code)
        raise Ended

    monkeypatch.setattr(worker.os, "_exit", leave)
    return codes


def full_disk(*_):
    raise OSError(28, "No space left on device")


def failing(*_):
    raise ValueError("no")


def test_a_control_thread(exits):
    with pytest.raises(Ended):
        control._or_end(failing, full_disk)
    assert exits == [1]


@pytest.mark.parametrize("what", ["log", "record_failure"])
def test_a_rank(exits, tmp_path, monkeypatch, what):
    for name, value in {PARENT_VARIABLE: "1", RUN_DIR_VARIABLE: str(tmp_path), "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(worker, "die_with_parent", lambda parent: None)
    monkeypatch.setattr(worker, "log_to_pool", lambda *_: None)
    monkeypatch.setattr(rank, "work", failing)
    if what == "log":
        monkeypatch.setattr(worker.log, "exception", full_disk)
    else:
        monkeypatch.setattr(worker, "record_failure", full_disk)
    with pytest.raises(Ended):
        worker.main()
    assert exits == [1]


def test_graphs_go_before_nccl(tmp_path, monkeypatch):
    """NCCL's end waits for that of all graphs it is in."""
    for name, value in {"FASTUSP_DEVICE_TYPE": "cpu", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    all_of_them = MagicMock()
    for name in ("dist", "meeting_of", "Crew", "Engine", "Runner"):
        monkeypatch.setattr(rank, name, getattr(all_of_them, name))
    all_of_them.Crew().rank, all_of_them.Crew().all_gather.return_value = 1, []
    rank.work(tmp_path)
    names = [name for name, _, _ in all_of_them.mock_calls]
    order = ["Runner().serve", "Engine().drop_evaluations", "Crew().agree", "dist.destroy_process_group"]
    assert names[-len(order) :] == order
