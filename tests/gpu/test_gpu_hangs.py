"""Ranks and GPUs that stand still in the middle of evaluations are found, and the pool is replaced."""

import os
import signal
import threading
import time

import pytest
import torch
from support import SMALL, inputs

from fastusp_backend.config import Layout, ModelSpec, Settings
from fastusp_backend.devices import Devices
from fastusp_backend.errors import PoolError
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import Pool, Progress, Session
from fastusp_backend.prompt import Prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HALTS = """
import signal

def halt_the_gpu(number, frame):
    import torch
    torch.cuda._sleep(1 << 45)

def loop(number, frame):
    while True:
        pass

signal.signal(signal.SIGUSR2, halt_the_gpu)
signal.signal(signal.SIGWINCH, loop)
"""
GIVEN = inputs(SMALL, text=24, size=(16, 12), seed=3)
PROMPT = Prompt(GIVEN.context, GIVEN.y, GIVEN.guidance)
RANKS = [1, pytest.param(2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"))]


@pytest.fixture(scope="module", params=RANKS, ids=lambda ranks: f"{ranks} GPUs")
def session(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(HALTS)
    path = folder / "flux.safetensors"
    write_checkpoint(str(path), SMALL, dtype=torch.bfloat16)
    spec = ModelSpec.of_file(str(path), storage=None, compute="bfloat16")
    ranks = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        pool = Pool(Devices(ranks=ranks, gpus=tuple(range(ranks))))
        yield Session(pool, spec, (Layout(ulysses=ranks, ring=1),), Settings())
        pool.close()


def sample(session, steps=6, progress=None):
    return session.sample(
        GIVEN.x, torch.linspace(1, 0, steps + 1), sampler="euler", positive=PROMPT, progress=progress or Progress()
    )


@pytest.fixture
def right(session):
    expected, before = sample(session), session.pool.status()["pids"]
    yield
    assert torch.equal(sample(session), expected)
    assert not set(session.pool.status()["pids"]) & set(before)


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (signal.SIGSTOP, "was stopped (SIGSTOP, Ctrl-Z)"),
        (signal.SIGWINCH, "made no progress for 12 s"),
        (signal.SIGUSR2, "made no progress for 12 s"),
    ],
    ids=["stopped", "looping", "GPU stands still"],
)
def test_in_a_step(session, right, number, what):
    victim, began = session.pool.status()["pids"][-1], []

    def step(event, _):
        if event.index == 20:
            os.kill(victim, number)
            began.append(time.monotonic())

    with pytest.raises(PoolError) as failure:
        sample(session, 50_000, Progress(step=step))
    assert time.monotonic() - began[0] < 16
    assert what in str(failure.value) and "while it evaluated the model" in str(failure.value), failure.value
    assert f"rank {session.pool.devices.ranks - 1} (process {victim})" in str(failure.value)


def test_a_gpu_that_stands_still_while_a_sampler_steps(session, right):
    """Its rank waits for a request, or is at one."""
    halt = threading.Timer(1.0, os.kill, (session.pool.status()["pids"][-1], signal.SIGUSR2))
    halt.start()
    began = time.monotonic()
    with pytest.raises(PoolError, match=r"made no progress for (1[2-5]|3[0-3]) s"):
        while time.monotonic() - began < 60:
            session.evaluate(GIVEN.x, torch.tensor([0.5]), PROMPT, Progress())
    halt.join()
