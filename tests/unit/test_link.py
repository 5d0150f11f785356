"""The client's end of the channel: neither a peer that does not read nor an interruption holds it up or harms it."""

import socket
import threading
import time

import pytest
import torch
from support import wait_until

from fastusp_backend.errors import ProtocolError
from fastusp_backend.pool.link import Link
from fastusp_backend.protocol import Cancel, Channel, Done, Phase, Release, Shutdown
from fastusp_backend.protocol.messages import ToClient, ToWorker

pytestmark = pytest.mark.unit


class Ends:
    def __init__(self):
        ours, theirs = socket.socketpair()
        self.channel, self.heard = Channel(ours, ToClient), []
        self.link = Link(self.channel, self.heard.append)
        self.worker = Channel(theirs, ToWorker)

    def send(self, message, tensors=None, meanwhile=lambda: None):
        self.link.send(self.channel.frame(message, tensors), meanwhile)


@pytest.fixture
def ends():
    before = threading.active_count()
    ends = Ends()
    yield ends
    ends.link.close()
    ends.worker.close()
    wait_until(lambda: threading.active_count() == before, 5)


def test_messages_go_both_ways_in_order(ends):
    ends.send(Release(id=1))
    ends.link.post(ends.channel.frame(Cancel(id=1)))
    assert [ends.worker.receive()[0] for _ in range(2)] == [Release(id=1), Cancel(id=1)]
    for n in range(3):
        ends.worker.send(Phase(id=n, text=""))
    assert [ends.link.receive(5)[0].id for _ in range(3)] == [0, 1, 2] == [message.id for message in ends.heard]
    assert ends.link.receive(0.01) is None


def test_a_message_is_heard_though_nobody_asks_for_it(ends):
    ends.worker.send(Done(id=7))
    wait_until(lambda: ends.heard == [Done(id=7)], 5)


def test_what_is_not_understood_is_told_in_its_turn(ends):
    ends.worker.send(Done(id=1))
    ends.worker.send_bytes(b"garbage")
    ends.worker.send(Done(id=2))
    assert ends.link.receive(5)[0].id == 1
    with pytest.raises(ProtocolError):
        ends.link.receive(5)
    assert ends.link.receive(5)[0].id == 2


def test_the_end_is_told_each_time(ends):
    ends.worker.close()
    for _ in range(3):
        with pytest.raises((EOFError, OSError)):
            ends.link.receive(5)
    with pytest.raises(OSError):
        ends.send(Shutdown())


class Stop(BaseException):
    pass


def test_who_sends_to_a_peer_that_does_not_read_can_be_interrupted(ends):
    """The frame follows whole, and the next one behind it."""
    large, asked = {"x": torch.arange(1 << 20, dtype=torch.uint8)}, []
    ends.channel.shares_memory = False

    def stop():
        asked.append(time.monotonic())
        if len(asked) == 3:
            raise Stop

    with pytest.raises(Stop):
        ends.send(Shutdown(), large, stop)
    ends.link.post(ends.channel.frame(Cancel(id=1)))
    message, tensors = ends.worker.receive()
    assert message == Shutdown() and torch.equal(tensors["x"], large["x"])
    assert ends.worker.receive()[0] == Cancel(id=1)


def test_a_close_ends_who_sends(ends):
    ends.channel.shares_memory = False
    failed = []

    def send():
        with pytest.raises(OSError) as error:
            ends.send(Shutdown(), {"x": torch.zeros(1 << 22)})
        failed.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    time.sleep(0.1)
    ends.link.close()
    thread.join(5)
    assert failed


def test_a_closed_link_takes_nothing(ends):
    ends.link.close()
    with pytest.raises(OSError):
        ends.send(Shutdown())


def test_without_threads_none_stays(monkeypatch):
    """Not even the one that could be started."""
    start, started = threading.Thread.start, []

    def one(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    near, far = socket.socketpair()
    with near, far, monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", one)
        with pytest.raises(RuntimeError, match="new thread"):
            Link(Channel(near, ToClient), lambda message: None)
        started[0].join(5)
        assert not started[0].is_alive()
