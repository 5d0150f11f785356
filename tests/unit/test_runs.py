"""Workers of several machines, run after run: what is said of one that has ended does not reach the next."""

import queue
import socket
import threading
import time

import pytest
from fake_workers import FakeProcesses
from support import wait_until

from fastusp_backend.devices import Devices, supports_bfloat16
from fastusp_backend.errors import PoolError
from fastusp_backend.pool import workers
from fastusp_backend.pool.cause import KILLED, UNTOLD
from fastusp_backend.pool.hangs import Hang, Suspicion
from fastusp_backend.protocol import Channel, Welcome
from fastusp_backend.protocol.machines import Awaits, Broke, Join, Run, Seen, Stop, ToFirst, ToMachine
from fastusp_backend.server import follower
from fastusp_backend.server.follower import Follower
from fastusp_backend.server.joined import JoinedWorkers
from fastusp_backend.server.machines import Machines
from fastusp_backend.server.software import Software

pytestmark = pytest.mark.unit

DEVICES = Devices(ranks=1)


@pytest.fixture
def first(tmp_path):
    """The first of two machines with one CPU rank each."""
    nothing = lambda: None  # noqa: E731
    return Machines(DEVICES, 2, "127.0.0.1", 8189, str(tmp_path / "key"), complete=nothing, ended=nothing)


@pytest.fixture
def second(first):
    """The channel of the second one, which has joined."""
    near, far = socket.socketpair()
    join = Join(machine=1, software=str(Software()), ranks=1, device="cpu", bfloat16=supports_bfloat16(DEVICES))
    far.settimeout(10)
    served = threading.Thread(target=first.serve, args=(join, "10.0.0.2", Channel(near, ToFirst)), daemon=True)
    served.start()
    wait_until(first._all, 5)
    channel = Channel(far, ToMachine)
    yield channel
    channel.close()
    served.join(10)
    assert not served.is_alive()


def test_what_ends_late_does_not_end_the_next_run(first, second):
    told = queue.SimpleQueue()
    old = first.begin(lambda *why: told.put(("old", *why))).run
    first.end(old)
    new = first.begin(lambda *why: told.put(("new", *why))).run
    assert [type(second.receive()[0]) for _ in range(3)] == [Run, Stop, Run]
    second.send(Broke(run=old, order=0, text="it was told to", lines=[]))
    second.send(Broke(run=new, order=3, text="it died", lines=[]))
    assert told.get(timeout=5) == ("new", None, False) and told.empty()
    assert first.reports(old, 5) == []
    assert [report.text for report in first.reports(new, 5)] == ["it died, on machine 1 (10.0.0.2)"]


def test_workers_that_are_ended_late_end_no_others(first, second):
    nothing = lambda *_: None  # noqa: E731
    old, new = (first.begin(nothing).run for _ in range(2))
    first.end(old)
    first.wait_for(old, "answer")
    board = first.board(new)
    assert first.board(old) is None and not board._closed
    first.wait_for(new, "start")
    first.end(new)
    assert board._closed
    assert [second.receive()[0] for _ in range(4)][2:] == [Awaits(what="start"), Stop()]


def test_ranks_of_the_last_run_that_were_still_are_not_the_next_ones(first, second):
    nothing = lambda *_: None  # noqa: E731
    old = first.begin(nothing).run
    still = {"memory": [(1, 2, 3, 4)], "lines": ["its last"], "quiet": True}
    second.send(Seen(run=old, **still))
    wait_until(lambda: first.quiet and first.memory(), 5)
    new = first.begin(nothing).run
    assert not first.quiet and not first.memory()
    second.send(Seen(run=old, **still))
    wait_until(lambda: first.lines()[-1:] == ["10.0.0.2 its last"], 5)
    second.send(Broke(run=old, order=0, text="", lines=[]))
    assert not first.quiet and not first.memory()
    second.send(Seen(run=new, **still))
    wait_until(lambda: first.quiet, 5)


def full():
    raise PoolError("Free space in /tmp")


def test_a_part_here_that_cannot_begin_ends_those_elsewhere(first, second, monkeypatch):
    monkeypatch.setattr(workers, "RunDir", full)
    with pytest.raises(PoolError, match="^Free space"):
        JoinedWorkers(DEVICES, lambda: None, first)
    run, stop = (second.receive()[0] for _ in range(2))
    assert isinstance(run, Run) and isinstance(stop, Stop)
    second.send(Broke(run=run.run, order=0, text="it was told to", lines=[]))
    second.shut()  # and nobody waits for workers that are not there


@pytest.mark.parametrize("waiting", [True, False])
def test_ranks_that_wait_for_another_machines_are_not_blamed(first, second, monkeypatch, waiting):
    """None was stopped there, which its machine would have told."""
    found = Suspicion("made no progress for 12 s", [])
    hang = Hang("rank 0 made no progress for 12 s while it evaluated the model", ["Rank 0 was in:"], waiting)
    monkeypatch.setattr(workers, "Processes", FakeProcesses)
    monkeypatch.setattr(workers.HangDetector, "look", lambda *_: found)
    monkeypatch.setattr(workers.HangDetector, "accuse", lambda *_: hang)
    joined = JoinedWorkers(DEVICES, lambda: None, first)
    wait_until(lambda: not joined.alive, 5)
    told = str(joined.failure("stopped"))
    joined.dispose()
    elsewhere = "a rank of machine 1 (10.0.0.2) made no progress for 12 s, and all ranks here waited for it"
    assert (elsewhere in told, hang.cause in told) == (waiting, not waiting) and "Rank 0 was in:" in told


@pytest.fixture
def leader(monkeypatch):
    """The channel of a first machine that another one follows."""
    near, far = socket.socketpair()
    far.settimeout(10)
    welcome = Welcome(version=1, ranks=2, device="cpu", per_machine=1, bfloat16=True)
    monkeypatch.setattr(follower, "enter", lambda *_: (Channel(near, ToMachine), welcome, "127.0.0.1"))
    monkeypatch.setattr(follower, "interface_of", lambda _: "lo")
    following = Follower(DEVICES, 1, "127.0.0.1:8189", "key")
    served = threading.Thread(target=following.serve, daemon=True)
    served.start()
    channel = Channel(far, ToFirst)
    assert isinstance(channel.receive()[0], Join)
    yield channel
    following.stop()
    served.join(20)
    channel.close()


def hear(channel: Channel, kind: type):
    """The next message of a kind."""
    while not isinstance(message := channel.receive()[0], kind):
        pass
    return message


def test_a_part_that_cannot_begin_is_told_and_another_one_may(leader, monkeypatch):
    monkeypatch.setattr(follower, "RunDir", full)
    for run in ("one", "two"):
        leader.send(Run(run=run, addresses=["127.0.0.1", "127.0.0.1"]))
        assert hear(leader, Broke) == Broke(run=run, order=0, text="Free space in /tmp", lines=[])


def test_no_part_begins_with_other_code_than_was_told(leader, first, second, monkeypatch):
    monkeypatch.setattr(Software, "_look", lambda self: "FastUSP 1234abcd and torch 2.13.0")
    leader.send(Run(run="one", addresses=["127.0.0.1", "127.0.0.1"]))
    assert hear(leader, Broke).text.startswith("Restart `serve`: it started with FastUSP ")
    with pytest.raises(PoolError, match="and there is FastUSP 1234abcd and torch 2.13.0 now$"):
        first.begin(lambda *_: None)


def test_to_have_been_ended_explains_nothing(leader, monkeypatch):
    """Behind whatever another machine's ranks tell, be it that they lost these."""
    monkeypatch.setattr(follower, "Processes", FakeProcesses)
    for order, told in ((KILLED, UNTOLD), (1, KILLED + 1), (4, 4)):
        monkeypatch.setattr(FakeProcesses, "ranked_cause", lambda *_, order=order: (order, "why"))
        leader.send(Run(run=str(order), addresses=["127.0.0.1", "127.0.0.1"]))
        wait_until(lambda order=order: hear(leader, Seen).run == str(order), 5)
        leader.send(Stop())
        assert hear(leader, Broke) == Broke(run=str(order), order=told, text="why", lines=[])


def test_a_machine_is_heard_of_while_its_processes_end(leader, monkeypatch):
    monkeypatch.setattr(follower, "SHOWN_SECONDS", 0.05)
    monkeypatch.setattr(follower, "Processes", Slow)
    for run in ("one", "two"):
        leader.send(Run(run=run, addresses=["127.0.0.1", "127.0.0.1"]))
        wait_until(lambda run=run: hear(leader, Seen).run == run, 5)
    Slow.going.clear()
    leader.send(Stop())
    assert Slow.asked.acquire(timeout=5)
    began = time.monotonic()
    assert [hear(leader, Seen).run for _ in range(20)] == ["two"] * 20
    assert time.monotonic() - began < 5
    Slow.going.set()
    assert hear(leader, Broke).run == "two"


class Slow(FakeProcesses):
    """Processes that end when they may."""

    going, asked = threading.Event(), threading.Semaphore(0)
    going.set()

    def kill(self, ranks):
        if not self.going.is_set():
            self.asked.release()
        self.going.wait(10)
        super().kill(ranks)
