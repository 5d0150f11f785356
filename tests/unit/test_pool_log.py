"""The pool's log and what ranks print stay bounded, and nothing of the newest is lost."""

import json
import logging
import os

import pytest

from fastusp_backend.pool.cause import LOG_LINES, last_log_lines
from fastusp_backend.worker import process

pytestmark = pytest.mark.unit

LIMIT = 2000


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """The log handlers of three ranks, of which the second prints to the descriptor `printed`."""
    monkeypatch.setattr(process, "LOG_BYTES", LIMIT)
    printed = os.open(tmp_path / "stdout.log", os.O_WRONLY | os.O_CREAT)  # as torchrun opens it, not to append
    handlers = [process._PoolLog(tmp_path / "pool.log", rank, (printed,) if rank == 1 else ()) for rank in range(3)]
    handlers[1].printed = printed
    yield handlers
    for handler in handlers:
        handler.close()
    os.close(printed)


def say(handler: logging.Handler, text: str) -> None:
    handler.handle(logging.LogRecord("x", logging.INFO, __file__, 1, text, None, None))


def test_the_log_is_bounded_and_its_last_lines_are_those_of_all_ranks(tmp_path, logs):
    for n in range(400):
        say(logs[n % 3], f"line {n}")
        assert sum((tmp_path / name).stat().st_size for name in os.listdir(tmp_path)) < 2 * LIMIT + 600
        expected = [f"[rank {k % 3}] INFO: line {k}" for k in range(max(0, n + 1 - LOG_LINES), n + 1)]
        assert last_log_lines(tmp_path) == expected
    both = [(tmp_path / name).read_text().splitlines() for name in ("pool.log.1", "pool.log")]
    numbers = [int(json.loads(line)["text"].split()[1]) for lines in both for line in lines]
    assert numbers == list(range(numbers[0], 400)) and len(numbers) > 30


def test_what_a_rank_prints_is_bounded(tmp_path, logs):
    path = tmp_path / "stdout.log"
    for n in range(200):
        os.write(logs[1].printed, f"a printed line {n}\n".encode())
        say(logs[1], "a record")
        assert path.stat().st_size <= LIMIT
    lines = path.read_bytes().splitlines()
    kept = len(lines) - 1  # the first may be the end of one
    assert lines[1:] == [f"a printed line {n}".encode() for n in range(200 - kept, 200)] and kept > 40


def test_a_log_that_cannot_be_written_harms_nobody(tmp_path, logs, capsys, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(process.os, "stat", full_disk)
    say(logs[0], "unheard")
    say(logs[1], "unheard")
    assert capsys.readouterr().err.count("No space left") == 2
