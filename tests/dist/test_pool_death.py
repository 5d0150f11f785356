"""Workers that die are replaced, strangers are refused, and nothing is left behind at the end."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from pools import GIVEN, LONG, ROOT, Stopwatch, evaluate, pids, processes_of, run_dir, sample, session
from support import open_files, relative_difference, wait_until
from test_patches import QKV, lora, patched, stack

from fastusp_backend import pulse
from fastusp_backend.devices import Devices
from fastusp_backend.errors import Cancelled, PoolError
from fastusp_backend.pool import Pool, Progress, workers
from fastusp_backend.prompt import Prompt
from fastusp_backend.protocol import VERSION

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def expected(shared_pool, dev):
    return evaluate(shared_pool(1), dev)


@pytest.mark.parametrize(
    "victim, by",
    [
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.thorough),
        (1, signal.SIGTERM),
        ("torchrun", signal.SIGKILL),
    ],
)
def test_death_in_mid_run(mortal, dev, expected, victim, by):
    sample(mortal, dev)
    before, directory = pids(mortal), run_dir(mortal)
    target = mortal._workers.processes.torchrun.pid if victim == "torchrun" else before[victim]
    watches = []

    def step(event, tensors):
        if event.index == 2:
            with open(directory / "pool.log", "a") as log:
                log.write('{"time": 1, "ra')  # a rank may die in the middle of a line
            os.kill(target, by)
            watches.append(Stopwatch())

    with pytest.raises(PoolError) as failure:
        sample(mortal, dev, LONG, Progress(step=step))
    assert watches[0].seconds < 10
    text = str(failure.value)
    who = victim if victim == "torchrun" else f"rank {victim}"
    assert f"{who} (process {target}) was ended by {by.name}" in text
    assert "[rank " in text.partition("Last log lines:")[2]
    assert "The next prompt starts new ones" in text
    assert mortal.status()["error"] == text
    wait_until(lambda: not processes_of(directory), 5)
    assert mortal.status()["state"] == "off"

    assert relative_difference(evaluate(mortal, dev), expected) < 2e-5
    assert not set(pids(mortal)) & set(before)
    assert not directory.exists()


def test_the_next_request_survives_a_death_while_idle(mortal, shared_pool, dev, expected):
    """New workers get its patches again."""
    patches = stack({QKV: [lora(QKV, 1)]})
    want, before = patched(mortal, dev, patches), pids(mortal)
    assert relative_difference(want, patched(shared_pool(1), dev, patches)) < 2e-5
    os.kill(before[1], signal.SIGKILL)
    wait_until(lambda: mortal.status()["state"] == "off", 10)
    assert f"rank 1 (process {before[1]}) was ended by SIGKILL" in mortal.status()["error"]
    assert torch.equal(patched(mortal, dev, patches), want)
    assert relative_difference(evaluate(mortal, dev), expected) < 2e-5
    assert not set(pids(mortal)) & set(before) and "error" not in mortal.status()


@pytest.mark.thorough
def test_a_death_that_nobody_has_noticed_yet(mortal, dev, monkeypatch):
    """torchrun is halted, so that it does not: it takes the request's way to find out. The prompt, which the dead held,
    is sent anew."""
    expected, before = evaluate(mortal, dev), pids(mortal)
    monkeypatch.setattr(workers, "DEATH_SECONDS", 0.2)
    torchrun = mortal._workers.processes.torchrun.pid
    os.kill(torchrun, signal.SIGSTOP)
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: not mortal._workers._link._inbox.empty(), 10)  # the end of the stream
    assert mortal.status()["state"] == "idle"
    assert torch.equal(evaluate(mortal, dev), expected)
    assert not set(pids(mortal)) & set(before)


def test_an_order_starts_no_processes(mortal, dev):
    """Workers that have just died, known or not, hold nothing."""
    evaluate(mortal, dev)
    starts = mortal.starts
    os.kill(pids(mortal)[0], signal.SIGKILL)
    with pytest.raises(PoolError, match="rank 0 .* was ended by SIGKILL"):
        mortal.release()
    mortal.release()
    mortal.park()
    assert mortal.starts == starts and mortal.held is None


def test_close_in_mid_run_leaves_nothing(run_dirs, shared_pool, dev, expected):
    """Two pools at once: each has processes, a socket and answers of its own, and the end of one is its own. Started
    workers are idle before anyone asks them; the request that runs at the end is told of it."""
    pool, other = Pool(Devices(ranks=2)), shared_pool(2)
    evaluate(other, dev)
    # Other pools, those of all tests, look at their ranks' pulses when they will.
    shm, others = set(os.listdir("/dev/shm")), [path for path in open_files() if not path.startswith(str(run_dirs))]
    assert pool.status() == {"devices": "cpu:2", "gpus": [], "ranks": 2, "state": "off", "starts": 0, "history": []}
    pool.release()
    pool.start()
    pool.start()
    assert pool.starts == 1 and pool.status()["state"] == "starting"
    wait_until(lambda: pool.status()["state"] == "idle", 60)
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda p: evaluate(p, dev), (pool, other)))
    assert all(relative_difference(result, expected) < 2e-5 for result in both)
    directory = run_dir(pool)
    assert directory.parent == run_dirs and directory != run_dir(other)
    assert not set(pids(pool)) & set(pids(other))
    assert processes_of(directory) == {*pids(pool), pool._workers.processes.torchrun.pid}
    closers = []

    def step(event, tensors):
        if event.index == 2:
            closers.append(threading.Thread(target=pool.close))
            closers[0].start()

    with pytest.raises(PoolError):
        sample(pool, dev, LONG, Progress(step=step))
    closers[0].join(15)
    pool.close()
    assert not processes_of(directory) and not directory.exists()
    assert pool.status()["state"] == "off"
    with pytest.raises(PoolError, match="was closed"):
        sample(pool, dev)
    wait_until(lambda: set(os.listdir("/dev/shm")) <= shm, 2)
    assert relative_difference(evaluate(other, dev), expected) < 2e-5
    files = open_files()
    assert not [path for path in files if path.startswith(str(directory))]
    assert len([path for path in files if not path.startswith(str(run_dirs))]) <= len(others) + 1


def test_workers_of_another_version_are_told_so(new_pool, dev, monkeypatch):
    """The pack was replaced on disk while this process runs: nothing but its restart helps."""
    monkeypatch.setattr(workers, "VERSION", VERSION + 1)
    with pytest.raises(PoolError, match=r"did not start: they speak another protocol version: .*restart ComfyUI"):
        evaluate(new_pool(1), dev)


@pytest.mark.thorough
def test_a_prompt_that_is_stopped_while_workers_start_leaves_them_be(new_pool, dev):
    pool = new_pool(1)
    prompt = Prompt(GIVEN.context, GIVEN.y, GIVEN.guidance)
    with pytest.raises(Cancelled):
        session(pool, dev).evaluate(GIVEN.x, GIVEN.timestep, prompt, Progress(interrupted=lambda: True))
    assert pool.starts == 1 and pool.status()["state"] == "starting"
    assert session(pool, dev).evaluate(GIVEN.x, GIVEN.timestep, prompt, Progress()).isfinite().all()
    assert pool.starts == 1


SLOW = """
import os, pathlib, time
pathlib.Path(os.environ["FASTUSP_RUN_DIR"], "importing").touch()
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys
with subprocess.Popen([sys.executable, "-m", sys.argv[1]], env=os.environ | {"FASTUSP_PARENT_PID": str(os.getpid())}):
    pass
"""


@pytest.mark.parametrize("entry", ["fastusp_backend.worker.launch", "fastusp_backend.worker"])
def test_processes_that_still_import_torch(tmp_path, entry):
    """That takes seconds, of a start: they die with their parent then, too, and a rank shows its pulse."""
    (tmp_path / "torch.py").write_text(SLOW)
    env = (
        os.environ
        | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "FASTUSP_RUN_DIR": str(tmp_path), "RANK": "0"}
        | {"CUDA_VISIBLE_DEVICES": ""}
    )
    with subprocess.Popen([sys.executable, "-c", PARENT, entry], env=env) as parent:
        wait_until((tmp_path / "importing").exists, 20)
        sign = pulse.Reader(tmp_path / "pulse-0").read()
        assert sign.doing == "while it started" if entry.endswith("worker") else sign is None
        parent.kill()
    wait_until(lambda: not processes_of(tmp_path), 5)


BROKEN = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "fastusp_backend.worker.rank":
            raise ValueError("numpy.dtype size changed")

sys.meta_path.insert(0, Finder())
"""


def test_what_ranks_cannot_import_is_told_as_theirs(new_pool, dev, tmp_path, monkeypatch):
    """torchrun's process imports it for them, and does not end of it."""
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(PoolError, match=r"rank [01] failed with ValueError: numpy\.dtype size changed"):
        evaluate(new_pool(2), dev)


CLIENT = """
import sys, torch
sys.path.insert(0, {tests!r})
from support import SMALL, inputs, spec_of
from fastusp_backend.config import Layout, Settings
from fastusp_backend.devices import Devices
from fastusp_backend.pool import Pool, Progress
from fastusp_backend.pool.session import Session
from fastusp_backend.prompt import Prompt
pool = Pool(Devices(ranks=2))
pool.start()
print(pool._workers.run_dir.path, flush=True)
given = inputs(SMALL, text=7, size=(8, 6))
session = Session(pool, spec_of({model!r}), (Layout(ulysses=2, ring=1),), Settings())
step = lambda event, tensors: print(event.index, flush=True)
sigmas = torch.linspace(1, 0, 5001)
prompt = Prompt(given.context, given.y, given.guidance)
session.sample(given.x, sigmas, sampler="euler", positive=prompt, progress=Progress(step=step))
"""


@pytest.mark.parametrize("moment", [pytest.param("starting", marks=pytest.mark.thorough), "sampling"])
def test_a_killed_client_takes_its_workers_along(new_pool, dev, moment):
    program = CLIENT.format(tests=str(ROOT / "tests"), model=str(dev))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    client = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=env)
    try:
        directory = Path(client.stdout.readline().strip())
        if moment == "starting":
            wait_until(lambda: len(processes_of(directory)) == 3, 60)
        else:
            assert client.stdout.readline().strip() == "0"
            assert len(processes_of(directory)) == 3
        client.send_signal(signal.SIGKILL)
        client.wait()
        wait_until(lambda: not processes_of(directory), 5)
        assert directory.exists()
        new_pool(1)
        assert not directory.exists()
    finally:
        client.kill()
        client.wait()
        client.stdout.close()
