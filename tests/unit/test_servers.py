"""What `gpus` means where it names a server, and the key file that belongs to it."""

import os
import stat
import sys
from pathlib import Path

import pytest

from fastusp_backend import keyfile
from fastusp_backend.__main__ import main
from fastusp_backend.cli.serve import address, place
from fastusp_backend.devices import Devices, local_devices
from fastusp_backend.door import enter
from fastusp_backend.errors import DeviceError, FastUSPError, KeyFileError, RequestError
from fastusp_backend.keyfile import Key, usual_path
from fastusp_backend.protocol.messages import ToAttached
from fastusp_backend.server import Server as Serving
from fastusp_backend.server.interfaces import interface_of
from fastusp_backend.servers import Server, known_servers, named_server

pytestmark = pytest.mark.unit


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "fastusp.toml"
    path.write_text(
        '[servers.box]\naddress = "10.0.0.5:8189"\nkey = "box.key"\n\n[servers.bare]\naddress = "[fe80::1]:81"\n'
    )
    return path


def test_names_and_addresses(toml, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", "/configured")
    box = Server("10.0.0.5:8189", toml.parent / "box.key")
    assert named_server(" box ", toml) == named_server("10.0.0.5:8189", toml) == box
    assert named_server("bare", toml) == Server("[fe80::1]:81", Path("/configured/fastusp/key"))
    assert named_server("gpu-box.local:99", toml) == Server("gpu-box.local:99", usual_path(), listed=False)
    for local in ("auto", "all", "0,1", "cpu:2", "cuda:0", "CUDA:0,1", "cuda:0,cuda:1", "other"):
        assert named_server(local, toml) is None
    assert named_server("box", toml.parent / "no.toml") is None


@pytest.mark.parametrize("text", ["[servers.box]\naddress = 3", "[servers", '[servers.a]\naddress = "b"\nother = 1'])
def test_a_file_that_says_something_else(toml, text):
    toml.write_text(text)
    with pytest.raises(DeviceError, match=f"^Correct {toml}: "):
        named_server("box", toml)


def test_an_address_that_is_none(toml):
    toml.write_text('[servers.box]\naddress = "box"')
    with pytest.raises(DeviceError, match='^Write address = "host:port" for server box'):
        named_server("box", toml)


def test_a_name_that_is_none(toml):
    assert known_servers(toml) == f"a server: 'host:port', or a name from {toml}, which has 'box', 'bare'"
    with pytest.raises(
        DeviceError, match="^Set 'auto', .*, or a server: 'host:port', or a name from .* has none: gpus"
    ):
        local_devices("bix", known_servers(toml.parent / "no.toml"))


def test_bench_takes_addresses(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastusp_backend", "bench", "x", "--gpus", "bix"])
    assert main() == 2 and ", or a server's 'host:port': gpus = 'bix' is not" in capsys.readouterr().err


def test_where_to_listen():
    assert address("10.0.0.1:80") == ("10.0.0.1", 80) and address("[::1]:0") == ("::1", 0)
    for wrong in ("80", "host", "host:", "host:99999", "a b:1"):
        with pytest.raises(RequestError, match="^Give --listen an address and a port"):
            address(wrong)


def test_machine_0_of_several():
    assert place(None, 1, 0, None) == ("127.0.0.1", 8189)
    assert place(None, 2, 1, "10.0.0.1:80") == place("10.0.0.1:80", 2, 0, "10.0.0.1:80") == ("10.0.0.1", 80)
    for wrong, told in (
        ((None, 2, 2, "10.0.0.1:80"), "Give --node-rank from 0 to 1"),
        ((None, 1, 0, "10.0.0.1:80"), "Give --nnodes too"),
        ((None, 2, 0, None), "Give --rdzv-endpoint"),
        (("10.0.0.2:80", 2, 0, "10.0.0.1:80"), "Leave --listen out"),
        ((None, 2, 0, "0.0.0.0:80"), "Give --rdzv-endpoint the address by which"),
        ((None, 2, 0, "foo"), "Give --rdzv-endpoint an address and a port, as 10.0.0.1:8189, not 'foo'"),
    ):
        with pytest.raises(RequestError, match=f"^{told}"):
            place(*wrong)


@pytest.mark.parametrize("host", ["203.0.113.7", "a..b"])
@pytest.mark.parametrize("machines, given", [(1, "--listen"), (2, r"--rdzv-endpoint \(on all machines\)")])
def test_an_address_of_another_machine(tmp_path, host, machines, given):
    key = Key.read_or_make(tmp_path / "key")
    with pytest.raises(FastUSPError, match=f"^Give {given} another address of this machine, or port.*: {host}:81: "):
        Serving(Devices(ranks=1), key, host, 81, machines)


def test_another_machine_has_no_key_file(tmp_path, monkeypatch, capsys):
    """fastusp.toml, which it does not read, is not named."""
    several = "--nnodes 2 --node-rank 1 --rdzv-endpoint 127.0.0.1:81".split()
    command = ["fastusp_backend", "serve", "--gpus", "cpu:1", *several, "--key", str(tmp_path / "key")]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 2
    told = f"Copy the key file from the server (it prints where it lies) to {tmp_path / 'key'}, or correct the path: "
    assert capsys.readouterr().err.startswith(f"{told}it cannot be read: No such")


def test_a_network_must_be_trusted(monkeypatch, capsys):
    command = ["fastusp_backend", "serve", "--gpus", "cpu:1", "--nnodes", "2", "--rdzv-endpoint", "10.0.0.1:80"]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 2 and capsys.readouterr().err.startswith("Give --trust-network if nobody else can reach or read")


def test_interfaces():
    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(RequestError, match="none of its network interfaces has 203.0.113.7"):
        interface_of("203.0.113.7")
    with pytest.raises(RequestError, match="^Give an address of IPv4"):
        interface_of("::1")


def test_a_key_file_is_made_once_and_for_its_owner(tmp_path):
    path = tmp_path / "folder" / "key"
    key = Key.read_or_make(path)
    assert Key.read_or_make(path) == Key.read(path) == key and len(key.secret) == 32
    private = tmp_path / "folder" / "key.private"
    assert [stat.S_IMODE(x.stat().st_mode) for x in (path.parent, path, private)] == [0o700, 0o600, 0o600]
    assert "PRIVATE" in private.read_text() and "PRIVATE" not in path.read_text()
    assert key.secret.hex() not in repr(key)
    key.server_context()
    other = Key.read_or_make(tmp_path / "other")
    assert other.secret != key.secret and other.certificate != key.certificate
    other.path.with_name("other.private").replace(private)
    with pytest.raises(KeyFileError, match="^Remove .*key and .*key.private, for new ones to be made"):
        key.server_context()
    private.unlink()
    with pytest.raises(
        KeyFileError, match="^Name another file with --key, .* give --node-rank: .*key is another server's"
    ):
        key.server_context()


def test_a_key_file_that_others_may_read(tmp_path):
    path = tmp_path / "key"
    Key.read_or_make(path)
    os.chmod(path, 0o640)
    with pytest.raises(KeyFileError, match=f"^chmod 600 {path}: "):
        Key.read(path)


@pytest.mark.parametrize("text", ["", "secret 00", "FastUSP key 1\nsecret " + "0" * 64])
def test_what_is_no_key_file(tmp_path, text):
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(KeyFileError, match="^Copy the key file from the server again"):
        Key.read(path)


def test_no_key_file_and_no_openssl(tmp_path, monkeypatch):
    with pytest.raises(KeyFileError, match="^Copy the key file from the server"):
        Key.read(tmp_path / "key")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KeyFileError, match="^Install the openssl command"):
        Key.read_or_make(tmp_path / "key")
    (tmp_path / "openssl").write_text("#!/bin/sh\necho broken >&2\nexit 1")
    (tmp_path / "openssl").chmod(0o700)
    with pytest.raises(KeyFileError, match="^Install another openssl.* it failed: broken"):
        Key.read_or_make(tmp_path / "key")
    assert not (tmp_path / "key").exists() and keyfile.usual_path().name == "key"


@pytest.mark.parametrize("host", ["a..b", "a" * 64])
def test_a_name_that_no_host_can_have(tmp_path, host):
    Key.read_or_make(tmp_path / "key")
    several = f"machine 0 of several: with --nnodes and --rdzv-endpoint {host}:81 in place of --listen"
    with pytest.raises(DeviceError, match=rf"^Start .* \({several}\), open its port, or correct the address"):
        enter(f"{host}:81", str(tmp_path / "key"), ToAttached)
