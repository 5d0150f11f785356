"""The store of several machines does what torch expects of one, for those that have the key and know the run."""

import socket
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from support import wait_until

from fastusp_backend.errors import DeviceError
from fastusp_backend.keyfile import Key
from fastusp_backend.meeting import Board, MeetingStore, board
from fastusp_backend.meeting import store as stores
from fastusp_backend.protocol.machines import Ask
from fastusp_backend.server.server import Server

pytestmark = pytest.mark.unit


class OneRun:
    """In the place of `Machines`."""

    def __init__(self):
        self.of = Board()

    def board(self, run: str) -> Board | None:
        return self.of if run == "now" else None


@pytest.fixture
def served(tmp_path):
    """(address, key file, the run) of a server that keeps a store."""
    from fastusp_backend.devices import Devices

    key = Key.read_or_make(tmp_path / "key")
    server = Server(Devices(ranks=1), key, "127.0.0.1", 0)
    server._machines = OneRun()
    threading.Thread(target=server._accept, daemon=True).start()
    yield f"127.0.0.1:{server.port}", str(key.path), server._machines
    server._stopped.set()
    server._listener.shutdown(socket.SHUT_RDWR)
    server._listener.close()


@pytest.fixture
def store(served):
    """store(): another rank's."""
    address, key, _ = served
    made = []

    def one(run: str = "now") -> MeetingStore:
        made.append(MeetingStore(address, key, run))
        return made[-1]

    yield one
    for channel in (channel for each in made for channel in each._idle):
        channel.close()


def test_what_one_sets_another_gets(store):
    one, other = store(), store()
    one.set("a", "text")
    one.multi_set(["b", "c"], [b"\x00\xff", b""])
    assert other.get("a") == b"text" and other.multi_get(["b", "c"]) == [b"\x00\xff", b""]
    assert other.check(["a", "b"]) and not other.check(["a", "x"])
    assert one.add("n", 2) == 2 and other.add("n", -1) == 1 and one.get("n") == b"1"
    assert one.delete_key("a") and not one.delete_key("a") and not other.check(["a"])
    assert one.compare_set("s", "", "first") == b"first"
    assert other.compare_set("s", "no", "second") == b"first" and other.compare_set("s", "first", "2") == b"2"


def test_torch_takes_it_for_a_store(store):
    one = store()
    prefixed = dist.PrefixStore("p", one)
    prefixed.set("key", "value")
    assert prefixed.get("key") == b"value" and one.get("p/key") == b"value"


def test_whoever_waits_is_woken(store):
    one, other = store(), store()
    threading.Timer(0.2, one.set, ("late", "x")).start()
    assert other.get("late") == b"x"
    with pytest.raises(RuntimeError, match="timed out: another rank did not come"):
        other.wait(["never"], timedelta(seconds=0.1))


def test_a_run_that_is_over_keeps_nobody_waiting(store, served):
    one = store()
    threading.Timer(0.2, served[2].of.close).start()
    with pytest.raises(RuntimeError, match="timed out"):
        one.get("never")
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        store("another run").set("a", "b")


def test_a_server_that_is_not_there(served, monkeypatch):
    monkeypatch.setattr(stores, "ENTER_SECONDS", 0.0)
    with pytest.raises(DeviceError, match="no server answers"):
        MeetingStore("127.0.0.1:1", served[1], "now")


def test_one_thread_asks_while_another_waits(store):
    """As NCCL's do, which look for news while the program waits for a rank."""
    one, told = store(), []
    waiting = threading.Thread(target=lambda: told.append(one.get("late")))
    waiting.start()
    wait_until(lambda: not one._idle, 5)
    began = time.monotonic()
    assert not one.check(["late"]) and one.add("n", 1) == 1 and time.monotonic() - began < 2
    one.set("late", "x")
    waiting.join(5)
    assert told == [b"x"] and len(one._idle) == 2


@pytest.mark.parametrize("given", [{"keys": ["a"], "values": [b"x" * 10]}, {"keys": ["a" * 11], "values": [b""]}])
def test_it_holds_no_more_than_it_may(monkeypatch, given):
    monkeypatch.setattr(board, "MOST_BYTES", 10)
    full = Board()
    with pytest.raises(ValueError, match="no more than 10 bytes"):
        full.answer(Ask(what="set", **given))
    assert not full.answer(Ask(what="check", keys=given["keys"])).found
    assert full.answer(Ask(what="add", keys=["n"], values=[b"1"])).values == [b"1"]


@pytest.mark.parametrize(
    "ask",
    [
        {"what": "set", "keys": ["a"]},
        {"what": "add", "keys": [], "values": [b"1"]},
        {"what": "add", "keys": ["a"], "values": []},
        {"what": "add", "keys": ["a"], "values": [b"one"]},
        {"what": "swap", "keys": ["a", "b"], "values": [b"", b""]},
        {"what": "swap", "keys": ["a"], "values": [b""]},
        {"what": "drop", "keys": ["a", "b"]},
        {"what": "drop", "keys": []},
        {"what": "get", "keys": ["a"], "seconds": float("nan")},
    ],
)
def test_what_makes_no_sense(ask):
    with pytest.raises(ValueError):
        Board().answer(Ask(**ask))
