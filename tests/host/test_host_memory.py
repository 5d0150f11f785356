"""The workers' weights beside the host's own models: unloaded with them, parked or released after a run."""

import os
import signal
import time

import pytest
from support import REORDERED
from test_host_life import run
from workflows import IN_WORKERS, STEPPING, Graph, difference

pytestmark = [pytest.mark.host, pytest.mark.any_host]

LOADING, FETCHING = "loading the model", "bringing the weights back"


def held(host) -> str:
    return host.pool("cpu:2")["held"]


def sampled(host, residency: str, sampler: str, seed: int):
    """(latents, status lines) of a short run."""
    graph = Graph()
    settings = graph.node("FastUSPSettings", wire="exact", attention="auto", residency=residency)
    sample = graph.sample(graph.usp(settings=settings), steps=2, seed=seed, sampler_name=sampler)
    saved = graph.save(sample)
    outcome = host.run(graph)
    return outcome.latents[saved], outcome.texts_of(sample[0])


@pytest.mark.parametrize("what", ["unload_models", "free_memory"])
def test_unloading_all_models_reaches_the_workers(host, what):
    run(host, seed=90 + len(what))
    before = host.pool("cpu:2")
    assert before["held"] == "resident" and before["nbytes"] > 1e6
    assert before["model"] == "dev.safetensors" and before["transport"] == "gloo, exact wire"
    host.post("/free", {what: True})
    deadline = time.monotonic() + 10
    while held(host) != "none":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    outcome = run(host, seed=110 + len(what))
    assert any(LOADING in text for _, text in outcome.texts)
    after = host.pool("cpu:2")
    assert after["held"] == "resident" and after["pids"] == before["pids"]


@pytest.mark.parametrize("weights", ["shared", "host"])
def test_blocks_that_travel(host, weights):
    """The same picture, and the node and the panel tell where the weights are."""
    want = sampled(host, "keep", "euler", 135)[0]
    graph = Graph()
    settings = graph.node("FastUSPSettings", wire="exact", attention="auto", weights=weights)
    sample = graph.sample(graph.usp(settings=settings), steps=2, seed=135, sampler_name="euler")
    saved = graph.save(sample)
    outcome = host.run(graph)
    assert difference(outcome.latents[saved], want) <= REORDERED
    told = host.pool("cpu:2")["weights"]
    assert told.startswith("0 of 2 blocks stay, 2 ")
    assert any(f"loaded: {told}" in text for text in outcome.texts_of(sample[0]))


@pytest.mark.parametrize(("sampler", "where"), [("euler", IN_WORKERS), ("uni_pc", STEPPING)])
def test_residency(host, sampler, where):
    """The pictures stay the same, to the bit where the weights are a mapped file's and not those that come back from
    host memory; weights move once a run, at its end and its start."""
    seeds = 130, 131
    kept = [sampled(host, "keep", sampler, seed)[0] for seed in seeds]
    assert held(host) == "resident"
    for residency, state, phase in (("park", "parked", FETCHING), ("release", "none", LOADING)):
        moves = []
        for seed, want in zip(seeds, kept, strict=True):
            bound = REORDERED if held(host) == "parked" else 0
            latents, texts = sampled(host, residency, sampler, seed)
            assert difference(latents, want) <= bound and any(where in text for text in texts)
            assert held(host) == state
            moves.append(sum(phase in text for text in texts))
        assert moves[1] == 1


@pytest.mark.thorough
def test_unloading_workers_that_have_just_died_does_not_stop_the_host(host):
    run(host, seed=140)
    pids = host.pool("cpu:2")["pids"]
    logged = len(host.log_text())
    os.kill(pids[0], signal.SIGKILL)
    host.post("/free", {"unload_models": True})
    deadline = time.monotonic() + 15
    while "was ended by SIGKILL" not in host.log_text()[logged:]:  # a prompt may come before what was asked for
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert run(host, seed=141).latents
    assert not set(host.pool("cpu:2")["pids"]) & set(pids)
