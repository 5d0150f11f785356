"""TLS for a thread that reads and one that writes, and what keeps strangers out."""

import os
import socket
import ssl
import threading
import time
from multiprocessing import AuthenticationError

import pytest
import torch
from support import wait_until

from fastusp_backend.keyfile import Key
from fastusp_backend.protocol import Cancel, Channel, Phase, Step, TlsStream
from fastusp_backend.protocol.messages import ToAttached, ToServer

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    return Key.read_or_make(tmp_path_factory.mktemp("key") / "key")


def sockets() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


@pytest.fixture
def streams(key):
    client, server = sockets()
    pair = TlsStream(client, key.client_context(), listens=False), TlsStream(server, key.server_context(), listens=True)
    greet = threading.Thread(target=pair[1].handshake)
    greet.start()
    pair[0].handshake(key.is_from)
    greet.join()
    yield pair
    for stream in pair:
        stream.close()


def test_both_ends_speak_at_once(streams):
    """More than any buffer holds, so that each write waits for the other end to read."""
    data, got = [os.urandom(6 << 20) for _ in streams], [bytearray(), bytearray()]

    def read(number: int) -> None:
        while len(got[number]) < len(data[0]):
            got[number] += streams[number].recv(1 << 16)

    threads = [threading.Thread(target=read, args=(n,)) for n in (0, 1)]
    threads += [threading.Thread(target=streams[n].sendall, args=(data[n],)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert bytes(got[0]) == data[1] and bytes(got[1]) == data[0]


def test_messages_and_tensors_of_any_size(streams):
    client, server = Channel(streams[0], ToAttached), Channel(streams[1], ToServer)
    client.send(Cancel(id=3))
    assert server.receive() == (Cancel(id=3), {})
    x = torch.randn(1 << 20)
    threading.Thread(
        target=server.send, args=(Step(id=1, index=0, total=1, sigma=1, seconds=1), {"x": x, "same": x})
    ).start()
    _, tensors = client.receive()
    assert torch.equal(tensors["x"], x) and torch.equal(tensors["same"], x) and not client.shares_memory


def test_a_part_of_a_message_is_a_sign_of_life(streams):
    """A large one may take longer, on a slow line, than the other end may be silent."""
    client, server = Channel(streams[0], ToAttached), Channel(streams[1], ToServer)
    began, reader = client.heard, threading.Thread(target=lambda: pytest.raises(EOFError, client.receive))
    reader.start()
    time.sleep(0.05)
    streams[1].sendall((1000).to_bytes(4, "big") + b"some of it")
    wait_until(lambda: client.heard > began, 5)
    server.shut()
    reader.join(10)
    assert not reader.is_alive()


def test_the_end_is_the_end(streams):
    client, server = Channel(streams[0], ToAttached), Channel(streams[1], ToServer)
    server.send(Phase(id=1, text=""))
    threading.Timer(0.1, client.shut).start()
    assert client.receive()[0] == Phase(id=1, text="")
    with pytest.raises(EOFError):
        client.receive()
    with pytest.raises(EOFError):
        server.receive()


def test_another_certificate_is_refused(key, tmp_path):
    client, server = sockets()
    impostor = Key.read_or_make(tmp_path / "key")
    theirs = TlsStream(server, impostor.server_context(), listens=True)
    greet = threading.Thread(target=theirs.handshake)
    greet.start()
    with pytest.raises(PermissionError):
        TlsStream(client, key.client_context(), listens=False).handshake(key.is_from)
    greet.join()
    client.close()
    server.close()


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"", b"\x16\x03\x01" + b"\xff" * 600])
def test_what_is_no_tls(key, said):
    client, server = sockets()
    client.sendall(said)
    client.shutdown(socket.SHUT_WR)
    with pytest.raises((ssl.SSLError, OSError)):
        TlsStream(server, key.server_context(), listens=True).handshake()
    client.close()
    server.close()


def test_a_wrong_secret_is_refused_before_anything_is_read(streams, key):
    client, server = Channel(streams[0], ToAttached), Channel(streams[1], ToServer)
    refused = []

    def serve() -> None:
        try:
            server.authenticate(key.secret, listens=True)
        except AuthenticationError as error:
            refused.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(AuthenticationError):
        client.authenticate(b"0" * 32, listens=False)
    thread.join(10)
    assert refused
