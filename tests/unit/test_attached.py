"""Workers of a server that is lost, or not what it was: played by a thread of this process."""

import contextlib
import socket
import threading
import time

import pytest
import torch
from channels import WHAT
from support import wait_until

from fastusp_backend.devices import ServerDevices
from fastusp_backend.errors import PoolError, RequestError
from fastusp_backend.keyfile import Key
from fastusp_backend.pool import Pool, Progress, attached, request
from fastusp_backend.protocol import VERSION, Channel, Evaluate, Ready, TlsStream, Welcome, channel
from fastusp_backend.protocol.messages import ToServer

pytestmark = pytest.mark.unit

READY = Ready(version=VERSION, devices=["cpu"], pids=[1], torch="2", backend="gloo")


class Played:
    """A server to one client, to which it says Welcome and Ready, and nothing more."""

    def __init__(self, key: Key, ranks: int):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._key, self._ranks = key, ranks
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.channel: Channel | None = None
        threading.Thread(target=self._greet, daemon=True).start()

    def _greet(self) -> None:
        stream = TlsStream(self._listener.accept()[0], self._key.server_context(), listens=True)
        stream.handshake()
        self.channel = Channel(stream, ToServer)
        self.channel.authenticate(self._key.secret, listens=True)
        self.channel.receive()
        self.channel.send(Welcome(version=VERSION, ranks=self._ranks, device="cpu", per_machine=1, bfloat16=True))
        with contextlib.suppress(EOFError):  # one that goes at once
            self.channel.receive()
            self.channel.send(READY)

    def close(self) -> None:
        self._listener.close()
        if self.channel is not None:
            self.channel.close()


@pytest.fixture
def attach(tmp_path, monkeypatch):
    """attach(ranks): a pool of a server that had one rank when it was asked."""
    monkeypatch.setattr(attached, "named", lambda spec: spec)
    made, key = [], Key.read_or_make(tmp_path / "key")

    def one(ranks: int = 1) -> Pool:
        server = Played(key, ranks)
        devices = {"address": server.address, "key": str(key.path), "kind": "cpu", "per_machine": 1, "bfloat16": True}
        made.extend([Pool(ServerDevices(ranks=1, **devices)), server])
        return made[-2]

    yield one
    for each in made:
        each.close()


def evaluate(pool: Pool, nbytes: int) -> None:
    tensors = {"x": torch.zeros(nbytes // 4)}
    pool.run(lambda workers: request.submit(workers, Evaluate(id=workers.next_id(), **WHAT), tensors, Progress()))


def test_a_connection_that_is_cut_while_something_is_sent_is_not_made_again(attach, monkeypatch):
    """Which would be waited for as long as connections are."""
    monkeypatch.setattr(attached, "LOST_SECONDS", 2)
    pool, began = attach(), time.monotonic()
    with pytest.raises(PoolError, match="stopped while a prompt ran: nothing was heard of it for 2 s"):
        evaluate(pool, 64 << 20)
    assert time.monotonic() - began < 6 and pool.starts == 1


def test_a_server_with_other_devices_than_before(attach):
    with pytest.raises(PoolError, match="it has other devices now; queue the prompt again"):
        evaluate(attach(ranks=2), 4)


def test_without_threads_it_ends_with_why(attach, monkeypatch):
    def no_more(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(attached, "Link", no_more)
    workers = attach().start()
    wait_until(lambda: not workers.alive, 5)
    with pytest.raises(PoolError, match="did not start: can't start new thread"):
        raise workers.failure("did not start")


def test_more_than_travels_at_a_time_is_refused(attach, monkeypatch):
    monkeypatch.setattr(channel, "MAX_FRAME", 1 << 20)
    with pytest.raises(RequestError, match="^Use smaller images, batches or LoRAs: 0.00 GB"):
        evaluate(attach(), 1 << 20)
