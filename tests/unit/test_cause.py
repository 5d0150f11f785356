"""Why workers ended: the rank that failed first is named, by what it and its system say; what ranks printed last."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from fastusp_backend.pool import cause
from fastusp_backend.pool.cause import LOG_LINES, find_cause, full_disk, printed_lines
from fastusp_backend.worker import torchrun
from fastusp_backend.worker.process import record_failure

pytestmark = pytest.mark.unit

TERM, KILL, SEGV = -signal.SIGTERM, -signal.SIGKILL, -signal.SIGSEGV
LOST = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3. This is "
    "typically caused by a remote worker crashing."
)
OWN = ValueError("no such thing")
LOST_TO = "rank 0 failed with RuntimeError: [/pytorch"


@pytest.mark.parametrize(
    "exits, records, cause",
    [
        ({1: KILL}, {0: LOST}, "rank 1 (process 11) was ended by SIGKILL (killed by hand, or by the system when"),
        ({1: SEGV, 0: 1}, {0: LOST}, "rank 1 (process 11) was ended by SIGSEGV"),
        ({1: TERM, 0: 1}, {0: LOST}, "rank 1 (process 11) was ended by SIGTERM"),
        ({0: 1, 1: 7}, {0: LOST}, "rank 1 (process 11) ended with exit code 7 and left no record of why"),
        ({1: 7, 0: TERM}, {}, "rank 1 (process 11) ended with exit code 7 and left no record of why"),
        ({0: TERM, 1: 7}, {}, "rank 1 (process 11) ended with exit code 7 and left no record of why"),
        ({1: TERM, 0: TERM}, {}, "rank 1 (process 11) was ended by SIGTERM"),
        ({0: 1, 1: TERM}, {0: OWN}, "rank 0 failed with ValueError: no such thing"),
        ({0: 1, 1: 1}, {0: LOST, 1: OWN}, "rank 1 failed with ValueError: no such thing"),
        ({0: 1, 1: TERM}, {0: LOST, 1: OWN}, "rank 1 failed with ValueError: no such thing"),
        ({0: 1}, {0: LOST}, LOST_TO),
        ({1: -63}, {}, "rank 1 (process 11) was ended by signal 63"),
    ],
)
def test_the_rank_that_failed_first_is_named(tmp_path, exits, records, cause):
    text = json.dumps([{"rank": rank, "pid": 10 + rank, "exitcode": code} for rank, code in exits.items()])
    (tmp_path / "exit.json").write_text(text)
    for rank, error in records.items():
        record_failure(tmp_path, rank, error)
    assert find_cause(tmp_path, SimpleNamespace(pid=5, returncode=1), killed=False, model=None).startswith(cause)


@pytest.mark.parametrize(
    "returncode, killed, cause",
    [
        (None, False, "its processes are still running"),
        (1, False, "torchrun ended with exit code 1"),
        (
            KILL,
            False,
            "torchrun (process 5) was ended by SIGKILL (killed by hand, or by the system when memory ran out)",
        ),
        (KILL, True, "their processes did not end by themselves, so the pool ended them"),
    ],
)
def test_what_ends_all_ranks_at_once_goes_before_a_rank_that_lost_another(tmp_path, returncode, killed, cause):
    torchrun = SimpleNamespace(pid=5, returncode=returncode)
    assert find_cause(tmp_path, torchrun, killed, None) == cause
    record_failure(tmp_path, 0, LOST)
    expected = cause if returncode in (KILL,) else LOST_TO
    assert find_cause(tmp_path, torchrun, killed, None).startswith(expected)
    if returncode == KILL:  # torchrun sends its ranks the signal that it was sent
        record_failure(tmp_path, 0, KeyboardInterrupt())
        assert find_cause(tmp_path, torchrun, killed, None) == cause
    record_failure(tmp_path, 1, OWN)
    assert find_cause(tmp_path, torchrun, killed, None) == "rank 1 failed with ValueError: no such thing"


@pytest.mark.parametrize("left, full", [((1, 9, 5), False), ((1, 0, 0), False), ((0, 9, 5), True), ((1, 9, 0), True)])
def test_a_full_disk_is_told(tmp_path, monkeypatch, left, full):
    blocks, files, free = left
    disk = SimpleNamespace(f_bavail=blocks, f_files=files, f_favail=free)
    monkeypatch.setattr(cause.os, "statvfs", lambda path: disk)
    assert ("set TMPDIR" in full_disk(tmp_path) and str(tmp_path) in full_disk(tmp_path)) is full
    monkeypatch.undo()
    assert full_disk(tmp_path / "removed") == ""


@pytest.mark.parametrize(
    "text",
    [
        "[/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:3: Connection reset by peer. This is",
        "[/gloo/transport/tcp/pair.cc:339] writev [127.0.0.1]:3: Broken pipe",
        "[/gloo/transport/tcp/pair.cc:812] Socket closed [127.0.0.1]:3",
        "[/gloo/transport/tcp/pair.cc:201] Socket unexpectedly closed [127.0.0.1]:3",
        "[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete",
        "Application timeout caused pair closure",
        "Gloo connectFullMesh failed with [/gloo/transport/tcp/pair.cc:152] connect [127.0.0.1]:3: Connection refused",
        "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "sendBytes failed on SocketImpl(fd=24, addr=[localhost]:3): Broken pipe",
        "wait timeout after 300000ms, keys: /default_pg/0//cpu//0",
        "NCCL error in: x.cpp:1, remote process exited or there was a network error, NCCL version 2.27",
        "ncclSystemError: System call failed.\nLast error:\nsocketProgress: Connection closed by remote peer host<3>",
        "NCCL communicator was aborted on rank 1.",
    ],
)
def test_a_rank_that_lost_another_says_so_in_many_ways(tmp_path, text):
    record_failure(tmp_path, 0, torch.distributed.DistBackendError(text))
    assert json.loads((tmp_path / "failure-0.json").read_text())["peer_lost"]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Connection closed by peer"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        RuntimeError("CUDA error: the launch timed out and was terminated"),
        RuntimeError("[enforce fail at gloo/transport/tcp/device.cc:1] fd != -1. Too many open files"),
    ],
)
def test_what_a_rank_did_itself_is_not_taken_for_another_ones_end(tmp_path, error):
    record_failure(tmp_path, 0, error)
    assert not json.loads((tmp_path / "failure-0.json").read_text())["peer_lost"]


def failure(tmp_path, rank: int, code: int, seconds: int) -> ProcessFailure:
    failed = ProcessFailure(rank, 10 + rank, code, str(tmp_path / "absent"))
    failed.timestamp = 1000 + seconds
    return failed


@pytest.mark.parametrize(
    "ended, expected",
    [
        (lambda f: ChildFailedError("", {1: f(1, 7, 0), 0: f(0, TERM, 1)}), [(1, 11, 7), (0, 10, TERM)]),
        (lambda f: ChildFailedError("", {1: f(1, 1, 0), 0: f(0, KILL, 30)}), [(1, 11, 1)]),
        (lambda f: SignalException("", signal.SIGTERM), [(None, torchrun.os.getpid(), TERM)]),
    ],
    ids=["in order", "killed by torchrun", "torchrun itself"],
)
def test_torchrun_leaves_who_ended_first(tmp_path, monkeypatch, ended, expected):
    def run(arguments):
        raise ended(lambda *what: failure(tmp_path, *what))

    monkeypatch.setattr(torchrun.torchrun, "run", run)
    assert torchrun.run(["script"], tmp_path) == 1
    exits = json.loads((tmp_path / "exit.json").read_text())
    assert [(x["rank"], x["pid"], x["exitcode"]) for x in exits] == expected


def write_printed(folder, rank: int, *lines: str) -> None:
    directory = folder / "ranks" / "run" / "attempt_0" / str(rank)
    directory.mkdir(parents=True)
    (directory / "stdout.log").write_text("\n".join(lines))
    (directory / "stderr.log").write_text("")


def test_printed_lines_are_shared_out_over_the_ranks(tmp_path):
    """Of 11 ranks, so that their names are no order of theirs; warnings come first, wherever a rank printed them."""
    for rank in range(11):
        write_printed(tmp_path, rank, *(f"host NCCL INFO {n}" for n in range(40)))
    ranks = [int(line.split()[1]) for line in printed_lines(tmp_path)]
    assert ranks == [0, *range(11)] and len(ranks) == LOG_LINES
    write_printed(tmp_path, 11, "host NCCL WARN no space left on device", *(f"INFO {n}" for n in range(40)), "last")
    printed = printed_lines(tmp_path)
    assert [int(line.split()[1]) for line in printed] == list(range(12))
    assert printed[-1] == "[rank 11 stdout] host NCCL WARN no space left on device"


def test_two_ranks_have_half_the_lines_each(tmp_path):
    write_printed(tmp_path, 0, "first", "Traceback", *(f"line {n}" for n in range(40)))
    write_printed(tmp_path, 1, *(f"line {n}" for n in range(3)))
    expected = ["Traceback", *(f"line {n}" for n in range(32, 40))]
    assert printed_lines(tmp_path) == [f"[rank 0 stdout] {line}" for line in expected] + [
        f"[rank 1 stdout] line {n}" for n in range(3)
    ]


def test_a_signal_that_torchrun_passed_on_is_torchruns(tmp_path):
    record_failure(tmp_path, 0, KeyboardInterrupt())
    (tmp_path / "exit.json").write_text(json.dumps([{"rank": None, "pid": 5, "exitcode": -2}]))
    torchrun = SimpleNamespace(pid=5, returncode=1)
    expected = "torchrun (process 5) was ended by SIGINT (Ctrl-C, or another process asked it to end)"
    assert find_cause(tmp_path, torchrun, False, None) == expected
    (tmp_path / "exit.json").unlink()
    assert find_cause(tmp_path, torchrun, False, None) == "rank 0 failed with KeyboardInterrupt"


@pytest.mark.parametrize("interrupted, other", [(0, 1), (1, 0)])
def test_of_ranks_that_were_asked_to_end_the_first_is_named(tmp_path, interrupted, other):
    """torchrun asks the others, by SIGTERM."""
    record_failure(tmp_path, interrupted, KeyboardInterrupt())
    exits = [{"rank": interrupted, "pid": 5, "exitcode": 1}, {"rank": other, "pid": 6, "exitcode": -15}]
    (tmp_path / "exit.json").write_text(json.dumps(exits))
    torchrun = SimpleNamespace(pid=4, returncode=1)
    assert find_cause(tmp_path, torchrun, False, None) == f"rank {interrupted} failed with KeyboardInterrupt"
    (tmp_path / "exit.json").write_text(json.dumps(exits[::-1]))
    assert find_cause(tmp_path, torchrun, False, None).startswith(f"rank {other} (process 6) was ended by SIGTERM")
