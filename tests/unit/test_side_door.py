"""Who is let in at the side door, where memory is shared: whoever proves it, and nobody else."""

import contextlib
import errno
import os
import secrets
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from channels import CONTENT, memory
from support import open_descriptors

from fastusp_backend import side_door
from fastusp_backend.errors import ProtocolError, RequestError
from fastusp_backend.protocol import Cancel, Channel, Done, Found
from fastusp_backend.protocol.machines import ToFirst
from fastusp_backend.protocol.messages import ToAttached
from fastusp_backend.side_door import SideDoor, find, look

pytestmark = pytest.mark.unit


@pytest.fixture
def ends():
    """A client's channel and the server's, in place of those over TLS."""
    near, far = socket.socketpair()
    pair = Channel(near, ToAttached), Channel(far, ToFirst)
    yield pair
    for channel in pair:
        channel.close()


@pytest.fixture
def door():
    with SideDoor() as door:
        yield door


def listens(name: str) -> bool:
    return f"@{name}" in Path("/proc/net/unix").read_text()


def answers(client: Channel, sock: socket.socket | None, change=lambda content: content) -> threading.Thread:
    """What is at the other end of the side door answers, with what it has found there or something else."""

    def answer() -> None:
        client.send(Found(content=change(look(sock) if sock is not None else b"")))

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


def test_who_shares_memory_is_let_in(ends, door):
    client, server = ends
    sock = find(door.name)
    answering = answers(client, sock)
    let_in = door.let_in(server)
    answering.join(10)
    one, other = Channel(sock, ToAttached), Channel(let_in, ToFirst)
    large = {"x": torch.randn(1 << 17)}
    for sender, receiver, message in ((one, other, Cancel(id=1)), (other, one, Done(id=1))):
        sender.send(message, large)
        said, tensors = receiver.receive()
        assert said == message and torch.equal(tensors["x"], large["x"]) and tensors.memory.fd >= 0
    one.close()
    other.close()
    assert not listens(door.name)


def test_each_door_has_a_name_of_its_own_that_goes_with_it():
    with SideDoor() as one, SideDoor() as other:
        assert one.name != other.name and listens(one.name) and listens(other.name)
    assert not listens(one.name) and find(one.name) is None


def test_on_another_machine_there_is_no_such_name():
    assert find(f"fastusp-{secrets.token_hex(16)}") is None and find("") is None


@pytest.mark.parametrize(
    "change", [lambda content: bytes(32), lambda content: content[:-1], lambda content: content * 2]
)
def test_a_wrong_answer_is_refused(ends, door, change):
    client, server = ends
    with find(door.name) as sock:
        answering = answers(client, sock, change)
        with pytest.raises(ProtocolError, match="it has found other content"):
            door.let_in(server)
        answering.join(10)
        assert sock.recv(1) == b""


def test_an_answer_without_having_come_is_refused(ends, door):
    client, server = ends
    client.send(Found(content=bytes(32)))
    with pytest.raises(ProtocolError, match="it has found other content"):
        door.let_in(server)


def test_another_message_than_the_answer_is_refused(ends, door):
    client, server = ends
    client.send(Cancel(id=1))
    with pytest.raises(ProtocolError, match="expected Found"):
        door.let_in(server)


def test_who_cannot_map_it_goes_on_where_it_was(ends, door, monkeypatch):
    client, server = ends

    def cannot(*_, **__):
        raise ProtocolError("no /proc")

    with find(door.name) as sock, monkeypatch.context() as patch:
        made = side_door.SharedMemory.made(32)
        patch.setattr(side_door.SharedMemory, "__init__", cannot)
        patch.setattr(side_door.SharedMemory, "made", lambda size: made)
        answering = answers(client, sock)
        assert door.let_in(server) is None
        answering.join(10)


def test_a_server_without_memory_says_so_at_once(ends, door, monkeypatch):
    client, server = ends

    def none_left(size):
        raise RequestError("too many files are open")

    monkeypatch.setattr(side_door.SharedMemory, "made", none_left)
    with find(door.name) as sock:
        answering = answers(client, sock)
        assert door.let_in(server) is None
        answering.join(2)
        assert not answering.is_alive()


def test_a_client_that_is_gone(ends, door):
    client, server = ends
    find(door.name).close()
    client.close()
    with pytest.raises(EOFError):
        door.let_in(server)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_is_passed_over(ends, door):
    """The name is for all to see."""
    client, server = ends
    come = "import os, socket; os.setuid(65534); s = socket.socket(socket.AF_UNIX)"
    wait = f"s.connect('\\0{door.name}'); print('in', flush=True); print(s.recv_into(bytearray(1)))"
    with subprocess.Popen([sys.executable, "-c", f"{come}; {wait}"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        with find(door.name) as sock:
            answering = answers(client, sock)
            door.let_in(server).close()
            answering.join(10)
        assert other.stdout.readline() == "0\n"


def test_another_users_server_is_not_trusted(door, monkeypatch):
    monkeypatch.setattr(side_door.os, "geteuid", lambda: 12345)
    before = open_descriptors()
    assert find(door.name) is None and open_descriptors() == before


HOSTILE = [
    "/run/user/0/bus",
    "\0fastusp-" + "0" * 32,
    "fastusp-" + "0" * 31,
    "fastusp-" + "0" * 32 + "\n",
    "fastusp-" + "A" * 32,
    "fastusp-../" + "0" * 29,
    "another-" + "0" * 32,
    "x" * 5000,
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_server_cannot_name_anothers_socket(name):
    with contextlib.ExitStack() as made:
        if len(name) < 100 and name[0] != "\0":
            there = made.enter_context(socket.socket(socket.AF_UNIX))
            there.bind(f"\0{name}")
            there.listen()
            there.setblocking(False)
        with pytest.raises(ProtocolError, match="is no name of a socket of its"):
            find(name)
        if len(name) < 100 and name[0] != "\0":
            with pytest.raises(BlockingIOError):
                there.accept()


@pytest.mark.parametrize("kind", ["sealed", "unsealed", "file", "pipe", "empty", "none", "end"])
def test_what_a_server_shows_that_is_no_memory(kind, tmp_path):
    near, far = socket.socketpair()
    near.settimeout(0.2)
    shown = []
    if kind == "file":
        (tmp_path / "file").write_bytes(CONTENT)
        shown = [os.open(tmp_path / "file", os.O_RDONLY)]
    elif kind == "pipe":
        shown = [*os.pipe()]
    elif kind in ("sealed", "unsealed", "empty"):
        shown = [memory(b"" if kind == "empty" else CONTENT, sealed=kind != "unsealed")]
    before = open_descriptors()
    if shown:
        socket.send_fds(far, [b"\0"], shown[:1])
    elif kind == "end":
        far.shutdown(socket.SHUT_RDWR)
    assert look(near) == (CONTENT if kind == "sealed" else b"")
    assert open_descriptors() == before
    for fd in shown:
        os.close(fd)
    near.close()
    far.close()


def test_where_no_more_files_can_be_open_there_is_no_door_and_the_client_stays_where_it_is(monkeypatch, ends, caplog):
    client, server = ends
    door = SideDoor()
    with monkeypatch.context() as patch, find(door.name) as sock:

        def full(*_):
            raise OSError(errno.EMFILE, "Too many open files")

        patch.setattr(socket.socket, "accept", full)
        answering = answers(client, None)
        assert door.let_in(server) is None and sock is not None
        answering.join(10)
        for place, call in ((socket.socket, "bind"), (socket, "socket")):
            patch.setattr(place, call, full)
            with SideDoor() as none:
                assert none.name == "" and find(none.name) is None
    assert "Raise `ulimit -n`" in caplog.text
