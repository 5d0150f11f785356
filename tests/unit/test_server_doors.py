"""Who comes to a server's door: strangers, who keep nobody out; a machine whose first one is lost."""

import contextlib
import logging
import queue
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from fastusp_backend.devices import Devices, supports_bfloat16
from fastusp_backend.door import enter
from fastusp_backend.errors import PoolError, ProtocolError
from fastusp_backend.keyfile import Key
from fastusp_backend.protocol import Attach, Channel, Ended, Failed, Release, Shown, Welcome
from fastusp_backend.protocol.machines import Join, ToFirst, ToMachine
from fastusp_backend.protocol.messages import ToAttached
from fastusp_backend.server import follower, machines, server, strangers
from fastusp_backend.server.machines import Machines
from fastusp_backend.server.software import Software
from fastusp_backend.server.strangers import STRANGERS, Strangers

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    return Key.read_or_make(tmp_path_factory.mktemp("key") / "key")


@pytest.fixture
def door(key):
    """A server that listens, without workers."""
    made = server.Server(Devices(ranks=1), key, "127.0.0.1", 0)
    threading.Thread(target=made._accept, daemon=True).start()
    yield made
    made._stopped.set()
    made._listener.shutdown(socket.SHUT_RDWR)
    made._listener.close()


def knock(door) -> socket.socket:
    stranger = socket.create_connection(("127.0.0.1", door.port))
    stranger.settimeout(10)
    return stranger


def comes_in(door, key) -> Channel:
    channel, welcome, _ = enter(f"127.0.0.1:{door.port}", str(key.path), ToAttached)
    assert welcome.ranks == 1
    return channel


def test_one_is_a_stranger_no_more_before_it_is_closed(door, monkeypatch):
    """Its descriptor may be another one's then, which would make way in its place."""
    left, leave = queue.SimpleQueue(), door._strangers.leave

    def leaves(sock):
        left.put(sock.fileno())
        leave(sock)

    monkeypatch.setattr(door._strangers, "leave", leaves)
    with knock(door) as loud:
        loud.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert left.get(timeout=5) >= 0


def test_the_silent_keep_nobody_out(door, key, monkeypatch):
    monkeypatch.setattr(server, "AUTHENTICATION_SECONDS", 60.0)  # else it is this that ends them
    began = time.monotonic()
    with contextlib.ExitStack() as open_ones:
        crowd = [open_ones.enter_context(knock(door)) for _ in range(STRANGERS + 3)]
        assert [stranger.recv(1) for stranger in crowd[:3]] == [b""] * 3
        for _ in range(10):
            comes_in(door, key).close()
        assert time.monotonic() - began < 8
        crowd[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            crowd[-1].recv(1)


def test_one_address_keeps_no_other_out():
    """Also where it is one of many that came first."""
    door, pairs = Strangers(), []

    def come(host: str) -> socket.socket:
        pairs.append(socket.socketpair())
        door.admit(pairs[-1][0], host)
        return pairs[-1][1]

    def ended(sock: socket.socket) -> bool:
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            return sock.recv(1) == b""
        return False

    hog = [come("10.0.0.9") for _ in range(2 * STRANGERS)]
    others = [come(f"10.0.1.{number}") for number in range(STRANGERS - 1)]
    assert [ended(sock) for sock in hog] == [True] * (2 * STRANGERS - 1) + [False]
    assert not any(map(ended, others))
    for pair in pairs:
        door.leave(pair[0])
        door.leave(pair[0])
    assert not door._from
    for sock in (sock for pair in pairs for sock in pair):
        sock.close()


@pytest.mark.parametrize(
    "one, other",
    [
        ("127.0.0.1", "127.9.9.9"),
        ("127.0.0.1", "::1"),
        ("10.0.0.1", "::ffff:10.0.0.1"),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9"),
        ("fe80::1%eth0", "fe80::2%eth0"),
    ],
)
def test_what_counts_as_one_address(one, other):
    assert strangers._origin(one) == strangers._origin(other) != strangers._origin("10.0.0.2")


def test_a_stranger_stays_not_for_long(door, monkeypatch, caplog):
    monkeypatch.setattr(server, "AUTHENTICATION_SECONDS", 0.3)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), knock(door) as silent, knock(door) as loud:
        loud.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert silent.recv(1) == b"" and time.monotonic() - began < 5
        while loud.recv(1 << 10):
            pass
    assert len(caplog.records) == 1 and "refused 127.0.0.1:" in caplog.text


def test_without_threads_one_is_refused_and_the_next_comes_in(door, key, monkeypatch, caplog):
    start, starts = threading.Thread.start, []

    def once(thread: threading.Thread) -> None:
        if thread.name.startswith("127.0.0.1:") and not starts:
            starts.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", once)
    with knock(door) as unlucky:
        assert unlucky.recv(1) == b""
    assert "can't start new thread" in caplog.text
    comes_in(door, key).close()


def test_more_clients_than_may_attach(door, key, monkeypatch):
    monkeypatch.setattr(server, "CLIENTS", 0)
    channel = comes_in(door, key)
    channel.send(Attach())
    told = channel.receive()[0]
    assert isinstance(told, Ended) and told.text.startswith("Close another ComfyUI")
    channel.close()


def test_a_client_hears_of_the_server_while_it_waits_for_the_last_workers_end(door, key, monkeypatch):
    ended = threading.Event()

    def start():
        ended.wait(5)
        raise PoolError("Free space in /tmp")

    monkeypatch.setattr(door._pool, "start", start)
    channel = comes_in(door, key)
    channel.send(Attach())
    assert isinstance(channel.receive()[0], Shown)
    ended.set()
    assert channel.receive()[0] == Ended(text="Free space in /tmp")
    channel.close()


def test_whoever_asks_before_there_are_workers_is_let_go(door, key, monkeypatch):
    monkeypatch.setattr(door._pool, "start", lambda: SimpleNamespace(alive=True, ready=None))
    channel = comes_in(door, key)
    channel.send(Attach())
    assert isinstance(channel.receive()[0], Shown)
    channel.send(Release(id=1))
    with pytest.raises(EOFError):
        channel.receive()
    channel.close()


def test_a_first_machine_that_is_lost_at_once(monkeypatch, caplog):
    """Between its Welcome and Join: it may come again."""
    monkeypatch.setattr(follower, "AGAIN_SECONDS", 0.01)
    welcome = Welcome(version=1, ranks=2, device="cpu", per_machine=1, bfloat16=True)
    tries = []

    def lost(address: str, key: str, receives: type):
        near, far = socket.socketpair()
        far.close()
        tries.append(address)
        if len(tries) == 3:
            machine.stop()
        return Channel(near, ToMachine), welcome, "127.0.0.1"

    monkeypatch.setattr(follower, "enter", lost)
    machine = follower.Follower(Devices(ranks=1), 1, "10.0.0.1:8189", "key")
    machine.serve()
    assert len(tries) == 3 and "the first machine is lost" in caplog.text


@pytest.fixture
def first(key):
    """The first of two machines with one CPU rank each."""
    nothing = lambda: None  # noqa: E731
    return Machines(Devices(ranks=1), 2, "127.0.0.1", 8189, str(key.path), complete=nothing, ended=nothing)


def test_a_machine_that_does_not_fit_is_refused(first, monkeypatch):
    """Of another size, with a number that none has, of other software, in the place of another."""
    monkeypatch.setattr(machines, "LOST_SECONDS", -1)
    near, far = socket.socketpair()
    bfloat16, other = supports_bfloat16(Devices(ranks=1)), "FastUSP 1234abcd and torch 2.7.0"
    join = {"machine": 1, "software": str(Software()), "ranks": 1, "device": "cpu", "bfloat16": bfloat16}
    first._add(1, "10.0.0.2", Channel(near, ToFirst))
    for given, told in (
        ({"ranks": 2}, "^Give --gpus 1 cpu devices of the kind that the first machine has, not 2 cpu ones"),
        ({"machine": 2}, "^Give --node-rank 1 to 1, not 2: --nnodes is 2"),
        ({"software": other}, f"^Install the same FastUSP and torch .*: machine 1 has {other}, the first one FastUSP"),
        ({}, r"^Give another --node-rank than 1: machine 1 \(10.0.0.2\) has joined"),
    ):
        with pytest.raises(ProtocolError, match=told):
            first.serve(Join(**(join | given)), "10.0.0.3", None)
    first._machines[1].link.close()
    far.close()


def test_a_machine_that_is_refused_ends_with_why(monkeypatch):
    near, far = socket.socketpair()
    welcome = Welcome(version=1, ranks=2, device="cpu", per_machine=1, bfloat16=True)
    monkeypatch.setattr(follower, "enter", lambda *_: (Channel(near, ToMachine), welcome, "127.0.0.1"))
    theirs = Channel(far, ToFirst)
    theirs.send(Failed(id=None, kind="protocol", rank=0, text="Give another --node-rank"))
    with pytest.raises(ProtocolError, match="^Give another --node-rank"):
        follower.Follower(Devices(ranks=1), 1, "10.0.0.1:8189", "key").serve()
    assert isinstance(theirs.receive()[0], Join)
    theirs.close()
