"""Rank 0's end of the control channel: one client, greeted whatever others do at the socket."""

import os
import socket
import threading
import time
from multiprocessing import AuthenticationError

import pytest
from support import wait_until

from fastusp_backend.protocol import VERSION, Cancel, Channel, Done, Failed, Hello, Ready, Release
from fastusp_backend.protocol.messages import ToClient
from fastusp_backend.worker import control
from fastusp_backend.worker.control import CLIENT_GONE, STRANGERS, Control

pytestmark = pytest.mark.unit

KEY = bytes(range(32))
READY = Ready(version=VERSION, devices=["cpu"], pids=[1], torch="2", backend="gloo")


class Rank:
    """Rank 0's control in this process. ends: exit codes with which it would have ended; deaths: what it recorded."""

    def __init__(self, folder, monkeypatch):
        self.address, self.ends, self.deaths = str(folder / "control.sock"), [], []
        self.channels, self.greeted = [], False
        monkeypatch.setattr(control.os, "_exit", self._end)
        self.control = Control(self.address, KEY, READY, self.deaths.append)

    def _end(self, code):
        self.ends.append(code)
        threading.Event().wait()  # the true one does not return

    def connect(self, key=KEY):
        channel = Channel.connect(self.address, ToClient)
        try:
            channel.authenticate(key, listens=False)
        except BaseException:
            channel.close()
            raise
        return channel

    def greet(self, message=None) -> tuple[Channel, object]:
        channel = self.connect()
        self.channels.append(channel)
        channel.send(message or Hello(version=VERSION))
        reply, _ = channel.receive()
        self.greeted |= reply == READY
        return channel, reply

    def raw(self, data: bytes) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.address)
        sock.sendall(data)
        return sock


@pytest.fixture
def rank(tmp_path, monkeypatch):
    rank = Rank(tmp_path, monkeypatch)
    yield rank
    for channel in rank.channels:
        channel.close()
    if rank.greeted:  # its thread must not end this process when os._exit is itself again
        wait_until(lambda: rank.ends, 30)


def ends(channel) -> bool:
    with pytest.raises((EOFError, OSError)):
        channel.recv_bytes(1000)
    channel.close()
    return True


def test_strangers_are_refused(rank):
    for key in (b"x" * 32, b""):
        with pytest.raises(AuthenticationError):
            rank.connect(key)
    for data in (b"", b"GET / HTTP/1.1\r\n\r\n" * 10, b"\x00\x00\x00\x10" + bytes(16), b"\x7f\xff\xff\xff"):
        rank.raw(data).close()
    for frame in (b"", b"garbage", os.urandom(300), b"FU\x00\x00\x00\x00\x00\x01\xc0"):
        connection = rank.connect()
        connection.send_bytes(frame)
        assert ends(connection)
    oversized = rank.connect()
    oversized._socket.sendall(b"\x7f\xff\xff\xff")
    assert ends(oversized)
    rank.connect().close()
    for message in (Hello(version=VERSION + 1), Release(id=1)):
        channel, reply = rank.greet(message)
        assert isinstance(reply, Failed) and reply.kind == "protocol"
        assert f"expected Hello of protocol version {VERSION}" in reply.text
        with pytest.raises((EOFError, OSError)):
            channel.receive()
        channel.close()
    channel, reply = rank.greet()
    assert reply == READY
    _, refused = rank.greet()
    assert "has a client" in refused.text
    channel.send(Release(id=1))
    assert rank.control.next_request() == (Release(id=1), {})
    assert not rank.ends


def test_silent_strangers_keep_nobody_out(rank):
    silent = [rank.raw(b"\x00") for _ in range(STRANGERS - 1)]
    channel, reply = rank.greet()
    assert reply == READY
    for sock in silent:
        sock.close()
    channel.close()


def test_silent_strangers_are_sent_away(rank, monkeypatch):
    """As many as are heard at a time: others get their turn when these have had theirs."""
    monkeypatch.setattr(control, "GREETING_SECONDS", 1)
    silent = [rank.raw(b"\x00") for _ in range(STRANGERS)]
    wait_until(lambda: not rank.control._strangers.acquire(blocking=False) or rank.control._strangers.release(), 5)
    with pytest.raises((EOFError, OSError)):
        rank.connect()
    for sock in silent:
        sock.settimeout(10)
        while sock.recv(1000):
            pass  # the challenge, then the end
    _, reply = rank.greet()
    assert reply == READY


def test_a_client_that_is_gone_ends_the_rank(rank):
    channel, _ = rank.greet()
    channel.close()
    wait_until(lambda: rank.ends == [CLIENT_GONE], 5)


@pytest.mark.parametrize("part", [b"\x00\x00", b"\x00\x00\x01\x00half"], ids=["of a length", "of a frame"])
def test_half_a_frame_and_the_end(rank, part):
    channel, _ = rank.greet()
    channel._socket.sendall(part)
    channel.close()
    wait_until(lambda: rank.ends == [CLIENT_GONE], 5)


def test_a_stream_that_cannot_be_understood_any_more_ends_the_rank_and_says_why(rank):
    channel, _ = rank.greet()
    channel._socket.sendall(b"\x7f\xff\xff\xff")
    wait_until(lambda: rank.ends == [1], 5)
    assert "is too large" in str(rank.deaths[0])


def test_what_has_not_arrived_is_cancelled_at_once(rank):
    """Its frame was refused, perhaps: nobody else would answer."""
    channel, _ = rank.greet()
    channel.send(Release(id=3))
    channel.send(Cancel(id=3))
    channel.send(Cancel(id=4))
    reply, _ = channel.receive()
    assert (reply.id, reply.kind) == (4, "cancelled") and rank.control.cancelled(3)


def test_what_has_ended_is_cancelled_at_once(rank):
    """Its answer was not understood, perhaps."""
    channel, _ = rank.greet()
    channel.send(Release(id=3))
    assert rank.control.next_request()[0] == Release(id=3)
    rank.control.send(Done(id=3))
    assert channel.receive()[0] == Done(id=3)
    channel.send(Cancel(id=3))
    reply, _ = channel.receive()
    assert (reply.id, reply.kind) == (3, "cancelled")


def test_who_says_something_now_and_then_is_sent_away_as_well(rank, monkeypatch):
    monkeypatch.setattr(control, "GREETING_SECONDS", 1)
    slow = rank.raw(b"\x00")
    slow.settimeout(10)
    began = time.monotonic()
    with pytest.raises(OSError):
        while time.monotonic() - began < 10:
            slow.sendall(b"\x00")
            time.sleep(0.2)
    assert time.monotonic() - began < 5
