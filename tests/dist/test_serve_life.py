"""What ends at a server, or on the way to it: told within ten seconds, and the next prompt is right."""

import contextlib
import os
import shutil
import signal

import pytest
import torch
from pools import LONG, Stopwatch, evaluate, forked, pids, processes_of, sample
from ports import free_port
from serving import run_dirs_of, serving
from support import wait_until

from fastusp_backend.errors import DeviceError, PoolError
from fastusp_backend.pool import Pool, Progress, ask

pytestmark = pytest.mark.dist

LIMIT = 10.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory, dev):
    folder = tmp_path_factory.mktemp("life")
    shutil.copy(dev, folder / dev.name)
    return folder


@pytest.fixture(scope="module")
def server(run_dirs, folder):
    """What tests end, another one follows at the same address."""
    with contextlib.ExitStack() as made:
        server = Again(folder, made)
        server.start()
        yield server


class Again:
    def __init__(self, folder, made: contextlib.ExitStack):
        self._folder, self._made, self.now = folder, made, None
        self._listen = f"127.0.0.1:{free_port()}"

    def start(self) -> None:
        """Again, where the last one was."""
        how = ["--gpus", "cpu:2", "--models", str(self._folder)]
        self.now = self._made.enter_context(serving(self._folder, *how, listen=self._listen))

    @property
    def address(self) -> str:
        return self.now.address


class Later:
    """Does something once, at a run's second step, and tells how long the run goes on from there."""

    def __init__(self, what):
        self._what, self.watch = what, None
        self.progress = Progress(step=self._step)

    def _step(self, event, _tensors) -> None:
        if event.index == 1:
            self._what()
            self.watch = Stopwatch()


def failure(pool, dev, what, **how) -> str:
    """What a run says in which something happens."""
    later = Later(what)
    with pytest.raises(PoolError) as raised:
        sample(pool, dev, LONG, later.progress, **how)
    assert later.watch.seconds < LIMIT, later.watch.seconds
    return str(raised.value)


def test_a_rank_that_dies_is_named_and_replaced(server, dev):
    pool = server.now.attach()
    expected = evaluate(pool, dev)
    before = pids(pool)
    told = failure(pool, dev, lambda: os.kill(before[1], signal.SIGKILL))
    assert f"The FastUSP workers of {server.address} stopped while a prompt ran" in told
    assert f"rank 1 (process {before[1]}) was ended by SIGKILL" in told and "Last log lines:" in told
    assert torch.equal(evaluate(pool, dev), expected) and not set(pids(pool)) & set(before)


@pytest.mark.thorough
def test_a_rank_that_dies_while_nobody_waits_is_replaced(server, dev):
    """Nobody's prompt fails."""
    pool = server.now.attach()
    expected, idle = evaluate(pool, dev), pids(pool)
    os.kill(idle[0], signal.SIGKILL)
    wait_until(lambda: pool.status()["state"] == "off", LIMIT)
    assert "rank 0" in pool.status()["error"]
    assert torch.equal(evaluate(pool, dev), expected) and not set(pids(pool)) & set(idle)


def _client(address: str, key: str, model, began) -> None:
    """In a process of its own: a run that goes on until it is killed."""
    sample(Pool(ask(address, key)), model, LONG, Progress(step=lambda *_: began.send(None)))


def test_a_client_whose_process_is_killed_takes_nothing_with_it(server, dev):
    """The next client's run begins within the limit, in the same workers."""
    pool = server.now.attach()
    expected, before = sample(pool, dev), pids(pool)
    pool.close()
    context = forked()
    told, began = context.Pipe(duplex=False)
    client = context.Process(target=_client, args=(server.address, str(server.now.key), dev, began))
    client.start()
    began.close()
    assert told.poll(60) and told.recv() is None  # its first step
    os.kill(client.pid, signal.SIGKILL)
    watch = Stopwatch()
    other = server.now.attach()
    assert torch.equal(sample(other, dev), expected) and pids(other) == before
    assert watch.seconds < LIMIT
    client.join()
    assert client.exitcode == -signal.SIGKILL


@pytest.mark.thorough
def test_a_server_that_is_killed_and_comes_back(server, dev):
    pool = server.now.attach()
    expected = evaluate(pool, dev)
    ranks, address = pids(pool), server.address
    told = failure(pool, dev, lambda: server.now.end(signal.SIGKILL))
    assert "the connection was lost" in told
    wait_until(lambda: not any(os.path.exists(f"/proc/{rank}") for rank in ranks), LIMIT)
    with pytest.raises(PoolError, match=rf"did not start: Start `python -m fastusp_backend serve --listen {address}`"):
        evaluate(pool, dev)
    with pytest.raises(DeviceError, match="no server answers"):
        ask(address, str(server.now.key))
    server.start()
    assert server.address == address
    assert torch.equal(evaluate(pool, dev), expected)


def test_a_server_that_is_stopped_is_lost(server, dev):
    pool = server.now.attach()
    expected = evaluate(pool, dev)
    told = failure(pool, dev, lambda: server.now.process.send_signal(signal.SIGSTOP))
    assert "nothing was heard of it for" in told
    server.now.process.send_signal(signal.SIGCONT)
    assert torch.equal(evaluate(pool, dev), expected)


def test_a_server_does_not_start_where_something_else_listens(server, folder):
    with serving(folder, "--gpus", "cpu:2", "--models", str(folder), listen=server.address) as second:
        second.says("Give --listen another address")
        assert second.process.wait(30) == 2


def test_sigterm_ends_all_and_says_so(server, run_dirs, dev):
    """The last test of this server."""
    pool = server.now.attach()
    evaluate(pool, dev)
    (directory,) = run_dirs_of(server.now.process.pid, run_dirs)
    ranks = pids(pool)
    told = failure(pool, dev, lambda: server.now.process.send_signal(signal.SIGTERM))
    assert "the server was ended" in told
    assert server.now.process.wait(LIMIT) == 0
    assert not directory.exists() and not processes_of(directory)
    assert not any(os.path.exists(f"/proc/{rank}") for rank in ranks)
