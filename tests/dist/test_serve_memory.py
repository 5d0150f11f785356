"""A server's client on the same machine sends large tensors in shared memory, which goes with it; any other sends them
inside TLS, with the same result."""

import os
import secrets
import signal
from pathlib import Path

import pytest
import torch
from pools import forked
from serving import Serving, serving
from support import SMALL, inputs, randn, spec_of, wait_until

from fastusp_backend import side_door
from fastusp_backend.config import Layout, Settings
from fastusp_backend.pool import Pool, Progress, Session, ask, attached
from fastusp_backend.prompt import Prompt
from fastusp_backend.protocol import channel as channels

pytestmark = pytest.mark.dist

SIZE, TOKENS = (30, 34), 15 * 17
GIVEN = inputs(SMALL, text=301, size=SIZE)
PROMPT = Prompt(GIVEN.context, GIVEN.y, GIVEN.guidance)


def evaluate(pool: Pool, model: Path, seed: int = 0) -> torch.Tensor:
    """With a ControlNet's tensors, more than travels inline where memory is shared."""
    residuals = [randn(1, TOKENS, SMALL.hidden, seed=seed + n) for n in range(2)]
    assert residuals[0].nbytes > channels.INLINE_LIMIT
    session = Session(pool, spec_of(model), (Layout(ulysses=2, ring=1),), Settings())
    return session.evaluate(GIVEN.x, GIVEN.timestep, PROMPT, Progress(), {"input": residuals, "output": []})


def held(server: Serving) -> int:
    """How many pieces of shared memory the server has mapped: its own, which its ranks read, and its clients'."""
    return Path(f"/proc/{server.process.pid}/maps").read_text().count("memfd:fastusp")


def named() -> set[str]:
    """What anybody could find of shared memory, and of sockets at an abstract name, of ours."""
    sockets = {word for word in Path("/proc/net/unix").read_text().split() if word.startswith("@fastusp-")}
    return {*os.listdir("/dev/shm")} | sockets


def test_each_way_gives_the_same_result(server, dev, shared_pool, monkeypatch):
    near = server.attach()
    got = [evaluate(near, dev, seed) for seed in (0, 10, 0)]
    workers = near._workers
    assert workers.channel.shares_memory and workers.channel.lasting_bytes > 2 * channels.INLINE_LIMIT
    server.says("127.0.0.1:\\d+ attaches, and shares memory\n")
    assert torch.equal(got[0], got[2]) and not torch.equal(got[0], got[1])
    assert torch.equal(evaluate(shared_pool(2), dev), got[0])
    nowhere = f"fastusp-{secrets.token_hex(16)}"
    for name, elsewhere in (
        ("find", lambda _: side_door.find(nowhere)),  # as in another network namespace
        ("look", lambda _: b""),  # as without /proc
    ):
        with monkeypatch.context() as patch:
            patch.setattr(attached, name, elsewhere)
            far = server.attach()
            assert torch.equal(evaluate(far, dev), got[0])
            assert not far._workers.channel.shares_memory and far._workers.channel.lasting_bytes == 0
        far.close()
    near.close()


def test_memory_goes_with_the_model_and_with_the_client(server, dev):
    before = held(server)
    for end in ("release", "close"):
        pool = server.attach()
        expected = evaluate(pool, dev)
        with_it = held(server)
        assert with_it >= 2
        getattr(pool, end)()
        wait_until(lambda: held(server) < with_it, 5)  # noqa: B023
        if end == "release":
            assert held(server) == 0 and torch.equal(evaluate(pool, dev), expected)
            pool.close()
    wait_until(lambda: held(server) <= max(1, before), 5)


def _client(address: str, key: str, model: Path, told) -> None:
    """In a process of its own, which is killed."""
    pool = Pool(ask(address, key))
    evaluate(pool, model)
    told.send(pool._workers.channel.shares_memory)
    signal.pause()


def test_nothing_is_left_of_what_was_killed(run_dirs, dev, tmp_path):
    before = named()
    with serving(tmp_path, "--gpus", "cpu:2", "--models", str(dev.parent)) as server:
        address, context = server.address, forked()
        told, tell = context.Pipe(duplex=False)
        client = context.Process(target=_client, args=(address, str(server.key), dev, tell))
        client.start()
        assert told.poll(60) and told.recv() is True
        assert held(server) == 2
        os.kill(client.pid, signal.SIGKILL)
        client.join()
        wait_until(lambda: held(server) == 1, 5)
        pool = server.attach()
        evaluate(pool, dev)
        assert pool._workers.channel.shares_memory
        server.end(signal.SIGKILL)
        wait_until(lambda: pool.status()["state"] == "off", 10)
        pool.close()
    wait_until(lambda: named() <= before, 10)
