"""A rank that stands still: Stop is heard, and the next prompt is right."""

import os
import signal
import time

import pytest
import torch
from workflows import Graph

from fastusp_backend.pool import hangs

pytestmark = [pytest.mark.host, pytest.mark.any_host]


def run(host, *, seed, steps=3, on_progress=None, again=False):
    """again: although ComfyUI may have the result still."""
    graph = Graph()
    latent = graph.empty()
    if again:
        latent = graph.node("RepeatLatentBatch", samples=latent, amount=1)
    graph.save(graph.sample(graph.usp("cpu:2"), steps=steps, seed=seed, latent_image=latent))
    return host.run(graph, on_progress=on_progress)


def stopped_after(host, seconds: float) -> None:
    graph = Graph()
    graph.node("TestStoppedSeconds", seconds=seconds)
    host.run(graph)


@pytest.fixture
def impatient(host):
    stopped_after(host, 6.0)  # a second more than an answer to Stop is waited for
    yield
    stopped_after(host, hangs.STOPPED_SECONDS)


@pytest.fixture
def expected(host, impatient):
    """The latents of a prompt, which has other workers afterwards."""
    (latents,), before = run(host, seed=901).latents.values(), host.pool("cpu:2")["pids"]
    yield
    (again,) = run(host, seed=901, again=True).latents.values()
    assert torch.equal(again, latents)
    assert not set(host.pool("cpu:2")["pids"]) & set(before) and host.pool("cpu:2")["state"] == "idle"


def halted(host, then):
    """(on_progress that halts rank 1 in the third step, when it did so)."""
    began = []

    def on_progress(value, _):
        if value >= 3 and not began:
            os.kill(host.pool("cpu:2")["pids"][1], signal.SIGSTOP)
            began.append(time.monotonic())
            then()

    return on_progress, began


def test_stop_at_a_rank_that_is_stopped(host, expected):
    on_progress, began = halted(host, lambda: host.post("/interrupt", {}))
    assert run(host, seed=903, steps=10_000, on_progress=on_progress).interrupted
    assert time.monotonic() - began[0] < 8
    assert host.pool("cpu:2")["state"] == "stopping"
