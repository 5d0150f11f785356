"""A pool's log for people who read along: every line once, in order, beyond the workers' end."""

import json

import pytest

from fastusp_backend.pool.log import LINES, WorkerLog

pytestmark = pytest.mark.unit


def record(number: int, **more) -> str:
    return json.dumps({"time": 0, "rank": 1, "level": "INFO", "text": f"line {number}"} | more) + "\n"


def texts(lines: list[str]) -> list[str]:
    return [line.partition(": ")[2] for line in lines]


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "ranks/0").mkdir(parents=True)
    return tmp_path


def test_each_line_comes_once_also_when_the_log_is_renamed(directory):
    log, path = WorkerLog(), directory / "pool.log"
    path.write_text(record(0) + record(1) + record(2)[:20])
    log.take(directory)
    lines, following = log.since(0)
    assert (texts(lines), following) == (["line 0", "line 1"], 2) and "[rank 1] INFO" in lines[0]
    path.write_text(record(0) + record(1) + record(2))
    path.rename(directory / "pool.log.1")
    path.write_text(record(3))
    log.take(directory)
    log.take(directory)
    lines, following = log.since(following)
    assert (texts(lines), following) == (["line 2", "line 3"], 4)
    assert log.since(4) == ([], 4)


def test_what_is_printed_and_traces(directory):
    log, printed = WorkerLog(), directory / "ranks/0/stdout.log"
    printed.write_bytes(b"NCCL \xff WARN\n")
    (directory / "pool.log").write_text(record(0, trace="Traceback\n  here") + "half a rec\n")
    log.take(directory)
    lines, _ = log.since(0)
    assert lines[1:] == ["Traceback", "  here", "half a rec", "[rank 0 stdout] NCCL \ufffd WARN"]
    printed.write_bytes(b"cut\n")
    log.take(directory)
    with printed.open("ab") as file:
        file.write(b"news\n")
    log.take(directory)
    assert log.since(len(lines))[0] == ["[rank 0 stdout] news"]


def test_it_is_bounded_and_another_run_follows(directory, tmp_path):
    log = WorkerLog()
    (directory / "pool.log").write_text("".join(map(record, range(LINES + 10))))
    log.take(directory)
    lines, following = log.since(0)
    assert texts(lines) == [f"line {n}" for n in range(10, LINES + 10)]
    assert log.since(10**9)[0] == lines, "of a ComfyUI before this one"
    second = tmp_path / "second"
    second.mkdir()
    (second / "pool.log").write_text(record(7))
    log.take(second)
    assert texts(log.since(following)[0]) == ["line 7"]
    log.take(tmp_path / "gone")
    assert log.since(0)[1] == following + 1
