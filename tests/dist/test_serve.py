"""Workers of a server are as good as those of this machine: the same results, refusals that name what is wrong, and
clients that take turns."""

import os
import re
import shutil
import socket
import threading

import pytest
import torch
from pools import LONG, PROMPT, SHORT, Stopwatch, evaluate, pids, sample, session
from support import wait_until
from test_patches import QKV, lora, patched, stack

from fastusp_backend.config import Layout
from fastusp_backend.errors import Cancelled, CheckpointError, KeyFileError, PoolError, RequestError
from fastusp_backend.keyfile import Key
from fastusp_backend.pool import Progress, ask, attached

pytestmark = pytest.mark.dist

LIMIT = 10.0
"""Seconds within which whatever goes wrong is told."""


@pytest.fixture
def attach(server):
    """attach(): a client's pool, which goes after the test; the server's workers stay."""
    pools = []

    def one():
        pools.append(server.attach())
        return pools[-1]

    yield one
    for pool in pools:
        pool.close()


def test_results_are_those_of_local_workers(attach, shared_pool, dev, schnell):
    local, remote = shared_pool(2), attach()
    for layout in (Layout(ulysses=2, ring=1), Layout(ulysses=1, ring=2)):
        assert torch.equal(evaluate(remote, dev, layout), evaluate(local, dev, layout))
    steps, phases = [], []
    follow = Progress(step=lambda event, tensors: steps.append((event.index, {*tensors})), phase=phases.append)
    assert torch.equal(sample(remote, schnell, progress=follow), sample(local, schnell))
    assert steps == [(n, {"x", "denoised"}) for n in range(3)]
    assert "loading the model" in phases
    patches = stack({QKV: [lora(QKV, 3)]})
    assert torch.equal(patched(remote, dev, patches), patched(local, dev, patches))


def test_the_panel_is_told_what_it_is_told_of_local_workers(attach, dev):
    remote = attach()
    run = session(remote, dev)
    evaluate(remote, dev)
    assert remote.held.model == run.spec and run.resident_bytes() > 1e6
    status = remote.status()
    assert (status["state"], status["ranks"], status["gpus"], status["model"]) == ("idle", 2, [], dev.name)
    wait_until(lambda: remote.status()["memory"] and all(remote.status()["memory"]), 5)
    wait_until(lambda: any("(Evaluate) took" in line for line in remote.log_since(0)[0]), 5)
    remote.release()
    assert remote.held.state == "none" and run.resident_bytes() == 0


def test_two_clients_take_turns(attach, shared_pool, dev):
    """Each with patches of its own: neither gets the other's."""
    given = [stack({QKV: [lora(QKV, seed)]}) for seed in (3, 5)]
    expected = [patched(shared_pool(2), dev, patches) for patches in given]
    clients, got, phases = [attach(), attach()], [[], []], []

    def work(number: int) -> None:
        for _ in range(4):
            got[number].append(patched(clients[number], dev, given[number], phase=phases.append))

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    for number in (0, 1):
        assert len(got[number]) == 4 and all(torch.equal(x, expected[number]) for x in got[number])
    assert "waiting for another client" in phases


def test_a_client_waits_for_another_ones_run_and_stops_it_not_but_itself(attach, dev):
    one, other, told, began = attach(), attach(), [], threading.Event()
    stop = threading.Event()
    run = threading.Thread(
        target=lambda: pytest.raises(
            Cancelled, sample, one, dev, LONG, Progress(step=lambda *_: began.set(), interrupted=stop.is_set)
        )
    )
    run.start()
    assert began.wait(30)
    third, stopped = attach(), threading.Event()
    third.start()
    wait_until(lambda: third.status()["state"] == "idle", 10)
    watch = Stopwatch()
    with pytest.raises(Cancelled):
        sample(third, dev, progress=Progress(phase=lambda _: stopped.set(), interrupted=stopped.is_set))
    assert watch.seconds < 3 and run.is_alive()

    def phase(text: str) -> None:
        told.append(text)
        if "another" in text:
            threading.Timer(0.3, stop.set).start()

    assert sample(other, dev, progress=Progress(phase=phase)).isfinite().all()
    assert told[1:] == ["waiting for another client"]
    run.join(10)
    assert not run.is_alive()
    with pytest.raises(Cancelled):
        sample(other, dev, LONG, Progress(interrupted=lambda: True))
    assert sample(one, dev).isfinite().all()


def test_another_clients_weights_stay(attach, dev):
    one, other = attach(), attach()
    evaluate(one, dev)
    evaluate(other, dev)
    one.release()
    assert other.held.state == "resident"
    other.release()
    wait_until(lambda: one.held.state == "none", 5)
    assert evaluate(one, dev).isfinite().all()  # its prompt, which went with them, is sent anew


def test_a_lost_client_takes_nothing_with_it(attach, server, dev):
    one, other = attach(), attach()
    evaluate(other, dev)
    before, ended = pids(other), []

    def cut(*_) -> None:
        one._workers.channel.shut()

    with pytest.raises(PoolError, match="the connection was lost"):
        sample(one, dev, LONG, Progress(step=cut))
    watch = Stopwatch()
    sample(other, dev, SHORT, Progress(phase=ended.append))
    assert watch.seconds < LIMIT and pids(other) == before
    sample(one, dev)  # attaches anew
    assert pids(one) == before and one.starts == 2


def test_a_file_that_the_server_lacks_is_named(attach, folder, dev, tmp_path):
    lonely = tmp_path / "lonely.safetensors"
    shutil.copy(dev, lonely)
    remote, models = attach(), folder / "models"
    with pytest.raises(RequestError, match=rf"^Copy lonely\.safetensors .* to {socket.gethostname()}.*{models}$"):
        evaluate(remote, lonely)
    shutil.copy(dev, models / lonely.name)
    assert evaluate(remote, lonely).isfinite().all()
    (models / lonely.name).unlink()


@pytest.mark.parametrize("change", ["size", "contents"])
def test_another_file_of_the_name_is_named(attach, folder, dev, tmp_path, change):
    ours, theirs = tmp_path / "twin.safetensors", folder / "models" / "twin.safetensors"
    shutil.copy(dev, ours)
    data = bytearray(ours.read_bytes())
    data[-1] ^= 1
    theirs.write_bytes(bytes(data) if change == "contents" else dev.read_bytes() + b"\0")
    told = "other contents" if change == "contents" else f"{len(data) + 1} bytes"
    with pytest.raises(RequestError, match=re.escape(f"{theirs} is another file ({told})")):
        evaluate(attach(), ours)
    theirs.unlink()


def test_a_path_is_not_taken_from_a_client(attach, dev, monkeypatch):
    """Also from one that has the key: the server's files outside the folders of --models are nobody's business."""
    monkeypatch.setattr(attached, "named", lambda spec: spec)
    remote = attach()
    for run in (evaluate, sample):
        with pytest.raises(RequestError, match="^Install the same FastUSP here and on the server: .* by its path"):
            run(remote, dev)
    monkeypatch.undo()
    assert evaluate(remote, dev).isfinite().all()


def test_a_file_that_changed_here_is_not_asked_for(attach, dev, tmp_path):
    path = tmp_path / dev.name
    shutil.copy(dev, path)
    run = session(attach(), path)
    os.utime(path, (1, 1))
    with pytest.raises(CheckpointError, match="^Queue the prompt again: .* was changed since"):
        run.sample(torch.zeros(1), SHORT, sampler="euler", positive=PROMPT)


def test_without_the_key_nobody_comes_in(server, tmp_path):
    Key.read_or_make(tmp_path / "another")
    with pytest.raises(KeyFileError, match="^Copy the key file from .* is another server's"):
        ask(server.address, str(tmp_path / "another"))
    known = server.key.read_text()
    secret = known.partition("secret ")[2][:64]
    forged = tmp_path / "forged"
    forged.write_text(known.replace(secret, "0" * 64))
    with pytest.raises(KeyFileError, match="others than its owner"):
        os.chmod(forged, 0o644)
        ask(server.address, str(forged))
    os.chmod(forged, 0o600)
    with pytest.raises(KeyFileError, match="^Copy the key file"):
        ask(server.address, str(forged))
    server.says("refused 127.0.0.1:", 15)
