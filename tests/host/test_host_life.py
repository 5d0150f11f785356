"""One host's pools over time: streaming, interrupting, staying warm, recovering, memory."""

import json
import os
import re
import signal
import time
from dataclasses import replace

import pytest
import torch
from comfy import PromptFailed
from workflows import DEV, IN_WORKERS, SCHNELL, STEPPING, TOLERANCE, Graph, difference

from fastusp_backend.models.flux import Flux
from fastusp_backend.models.synthetic import TINY_FLUX

pytestmark = pytest.mark.host


def run(host, *args, seed, steps=2, **loader):
    graph = Graph()
    graph.save(graph.sample(graph.usp(*args, **loader), steps=steps, seed=seed))
    return host.run(graph)


def slow_run(host, on_progress=None, *, seed, steps=4000, gpus="cpu:2", sampler_name="euler"):
    """Steps long enough to be told apart, and more of them than anybody waits for."""
    graph = Graph()
    inputs = {"latent_image": graph.empty(384, 384), "positive": graph.prompt(1, 256), "sampler_name": sampler_name}
    graph.save(graph.sample(graph.usp(gpus), steps=steps, seed=seed, **inputs))
    return host.run(graph, on_progress=on_progress)


@pytest.mark.any_host
def test_progress_and_previews_arrive_one_by_one(host):
    outcome = slow_run(host, steps=8, seed=31)
    values = [value for value, *_ in outcome.progress]
    assert values == sorted(values) and values[-1] == 8 and len(values) >= 7
    assert len({round(at, 3) for *_, at in outcome.progress}) >= 6, "they came together"
    assert outcome.previews >= 7
    assert any(IN_WORKERS in text for _, text in outcome.texts)


def test_the_log_and_the_panel_say_what_runs(host):
    """Once for what does not change: a sampler that steps from ComfyUI reports at each step."""
    began = len(host.log_text())
    for sampler in ("euler", "ipndm"):
        graph = Graph()
        graph.save(graph.sample(graph.usp("cpu:3", ring=3), steps=4, seed=33, sampler_name=sampler))
        host.run(graph)
    lines = [line.partition("FastUSP: ")[2] for line in host.log_text()[began:].splitlines() if "FastUSP: " in line]
    assert lines[0] == f"ulysses 1 x ring 3 on cpu:3, {IN_WORKERS}" and "starting 3 worker(s) on cpu:3" in lines
    assert re.fullmatch(
        r"the workers on cpu:3 \(cpu \(1 thread\), .*\) are ready, \d+\.\d s after their start", lines[2]
    )
    assert len([line for line in lines if line == f"{STEPPING}no ipndm in the workers)"]) == 1
    assert len(lines) == len(set(lines)) < 8, lines
    assert host.pool("cpu:3")["layout"] == "ulysses 1 x ring 3"


def _interrupted(host, sampler: str, seed: int) -> tuple[int, float, float]:
    """Of a prompt that was interrupted: the steps that still came, the seconds until it had ended, those of a step."""
    times, interrupted = [], []

    def interrupt(value, _):
        times.append(time.monotonic())
        if value >= 5 and not interrupted:
            host.post("/interrupt", {})
            interrupted.append(time.monotonic())

    outcome = slow_run(host, interrupt, seed=seed, sampler_name=sampler)
    took = time.monotonic() - interrupted[0]
    assert outcome.interrupted and outcome.texts[-1][1] == "FastUSP: interrupted"
    return sum(at > interrupted[0] for at in times), took, (times[4] - times[0]) / 4


@pytest.mark.parametrize("sampler", ["euler", "uni_pc"])
def test_interrupt(host, sampler):
    run(host, seed=40)
    pids = host.pool("cpu:2")["pids"]
    for seed in (41, 43, 44):  # a machine that is busy may be late once
        later, took, step = _interrupted(host, sampler, seed)
        if later <= 2 and took < 2.5 * step + 0.5:
            break
    else:
        pytest.fail(f"{later} steps and {took:.2f} s later, where a step takes {step:.2f} s")
    assert run(host, seed=42).latents
    assert host.pool("cpu:2")["pids"] == pids


def test_warm_over_files_layouts_and_settings(host):
    run(host, seed=50)
    before = host.pool("cpu:2")
    assert run(host, seed=51).latents
    assert run(host, "cpu:2", 1, 2, seed=52).latents
    assert run(host, file=SCHNELL, seed=53).latents
    for storage in ("bf16", "fp16", "fp32"):
        assert run(host, weight_dtype=storage, seed=54).latents
    graph = Graph()
    settings = graph.node("FastUSPSettings", wire="exact", attention="math")
    graph.save(graph.sample(graph.usp(settings=settings), steps=2, seed=55))
    assert host.run(graph).latents
    after = host.pool("cpu:2")
    assert after["pids"] == before["pids"] and after["starts"] == before["starts"]
    assert after["state"] == "idle" and after["ranks"] == 2


def test_a_file_that_changed_is_loaded_anew(host):
    """The loader runs again, though nothing in the prompt has changed; of a file that was overwritten in place, too, in
    which the workers' weights lie."""
    models = host.base / "models/diffusion_models"
    file = models / "changed.safetensors"
    try:
        results = []
        for source, replaced in ((DEV, True), (SCHNELL, True), (DEV, False), (None, False), (DEV, False)):
            if replaced:
                file.unlink(missing_ok=True)
            if source is None:
                os.truncate(file, file.stat().st_size - 1)
                with pytest.raises(PromptFailed, match="is truncated: tensor"):
                    run(host, file=file.name, seed=56)
                continue
            file.touch()
            with open(file, "r+b") as opened:
                opened.write((models / source).read_bytes())
                opened.truncate()
            (latents,) = run(host, file=file.name, seed=56).latents.values()
            results.append(latents)
        (want,) = run(host, file=SCHNELL, seed=56).latents.values()
    finally:
        file.unlink()
    assert results[1].equal(want) and not results[0].equal(want)
    assert all(difference(again, results[0]) < TOLERANCE for again in results[2:])


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.thorough), 1])
def test_killed_worker(host, rank):
    run(host, seed=60 + rank)
    pids = host.pool("cpu:2")["pids"]
    killed = []

    def kill(value, _):
        if value >= 3 and not killed:
            os.kill(pids[rank], signal.SIGKILL)
            killed.append(time.monotonic())

    with pytest.raises(PromptFailed) as error:
        slow_run(host, kill, seed=62 + rank)
    assert time.monotonic() - killed[0] < 10
    assert f"rank {rank} (process {pids[rank]}) was ended by SIGKILL" in error.value.text
    assert "The next prompt starts new ones" in error.value.text
    assert run(host, seed=64 + rank).latents
    assert not set(host.pool("cpu:2")["pids"]) & set(pids)


def write_zeros(path, config) -> int:
    """A FLUX file that takes no room on the disk; returns the bytes of its tensors."""
    with torch.device("meta"):
        shapes = {Flux.file_key(name): p.shape for name, p in Flux(config).named_parameters()}
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = shape.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return offset


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


@pytest.mark.any_host
def test_the_hosts_memory_does_not_grow_with_the_file(host):
    file = host.base / "models/diffusion_models/large.safetensors"
    config = replace(TINY_FLUX, hidden=3072, heads=24, mlp=12288, double_blocks=1, single_blocks=2)
    run(host, "cpu:1", seed=70)
    before = resident(host.process.pid)
    try:
        assert write_zeros(file, config) > 1.2e9
        assert run(host, "cpu:1", file=file.name, steps=1, seed=71).latents
    finally:
        file.unlink()
    assert resident(host.process.pid) - before < 1e8
