"""The command line on CPU ranks: `verify` measures each lossy option, and finds that the ranks agree; `bench` times all
that there is to choose; `doctor` lets the pool work, and says so when it does not. `doctor` runs as a user's command,
in a process and with pools of its own; the others run in this process, with pools that run already."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import replace

import pytest
import torch
from PIL import Image
from pools import GIVEN, PROMPT, ROOT, pids
from support import spec_of, wait_until

from fastusp_backend.__main__ import main
from fastusp_backend.cli import bench, demo, verify
from fastusp_backend.cli.bench import Bench, Row
from fastusp_backend.cli.doctor.trial import Job
from fastusp_backend.config import Layout, Settings
from fastusp_backend.errors import PoolError
from fastusp_backend.pool import Pool
from fastusp_backend.pool import request as requests

pytestmark = pytest.mark.dist


@pytest.fixture
def run(shared_pool, monkeypatch, capsys):
    """run(arguments): (exit code, what is printed, what goes to stderr, ranks of the pools in the order in which they
    were closed) of a command in this process, on the pools of all tests, which stay open."""
    closed = []

    def close(what):
        if not isinstance(what, Pool):
            return closing(what)
        closed.append(what.devices.ranks)
        return nullcontext(what)

    for command in (verify, bench, demo):
        monkeypatch.setattr(command, "Pool", lambda devices: shared_pool(devices.ranks))
        monkeypatch.setattr(command, "closing", close)

    def of(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["fastusp_backend", *arguments])
        return main(), *capsys.readouterr(), closed

    return of


def test_verify(run, dev, monkeypatch):
    for name, value in {"CAPTIONS": 1, "PIXELS": 128, "PICTURE_STEPS": 20}.items():  # takes half the time
        monkeypatch.setattr(verify, name, value)
    caches = {name: of for name, of in verify.CACHES.items() if of["cache_threshold"] == 0.1}
    monkeypatch.setattr(verify, "CACHES", caches)
    arguments = ("verify", str(dev), "--gpus", "cpu:2", "--size", "128", "--text", "9", "--steps", "2")
    code, printed, errors, closed = run(*arguments)
    assert (code, closed) == (0, [2, 1]), printed + errors
    lines = {line[:60].strip(): line[60:] for line in printed.splitlines()[2:]}
    both = "int8 wire and fp8 products"
    lossy, cached = ["fp8 wire", "int8 wire", "fp8 products", "fp8 wire and fp8 products", both], [*caches]
    cached += [f"{both}, cache easy", f"{both}, cache first_block"]
    ranks = "2 ranks, against one"
    assert [*lines][:9] == lossy + cached and ranks in lines
    figures = {name: [float(x) for x in re.findall(r"[0-9.]+e[-+][0-9]+", line)] for name, line in lines.items()}
    assert figures["int8 wire"][0] < figures["fp8 wire"][0]
    for name in lossy + cached[2:]:
        assert len(figures[name]) == 4 and all(1e-4 < x < 0.1 for x in figures[name]), name
    assert all(figures[name] == [0, 0, 0, 0] for name in cached[:2]), "of two steps none is skipped"
    assert figures[cached[2]] == figures[cached[3]] == figures[both]
    assert all(x < 2e-5 for x in figures[ranks])
    decibels = {}
    for name in [*lossy, *cached, ranks]:
        milliseconds, decibels[name], _, *skipped = map(float, lines[name].split()[4:])
        assert milliseconds > 0
        assert skipped == ([0, skipped[-1]] if name in cached else []) and all(skipped[1:]), name
    assert decibels.pop(ranks) > 100 and all(20 < x < 80 for x in decibels.values())
    assert "exact ones meet" in printed
    assert all(re.search(rf"^For {budget} dB: .*\d ms a step", printed, re.MULTILINE) for budget in (40, 30))


@pytest.mark.parametrize("command", ["verify", "bench", "plan"])
def test_a_file_that_is_none_is_named(run, command):
    assert run(command, "/nowhere.safetensors", "--gpus", "cpu:1") == (
        2,
        "",
        "Give the path of a file that exists: there is no model file /nowhere.safetensors\n",
        [],
    )


def test_verify_refuses_runs_of_no_steps(run, dev):
    code, printed, errors, closed = run("verify", str(dev), "--gpus", "cpu:1", "--steps", "0")
    assert (code, printed, closed) == (2, "", []) and errors.startswith("Give --steps 1 or more: it is 0")


def test_bench(run, dev):
    sizes = ["--size", "128x96", "--text", "9", "--steps", "2"]
    code, printed, errors, closed = run("bench", str(dev), "--gpus", "cpu:2", *sizes, "--layouts", "all")
    assert (code, closed) == (0, [1, 2]), printed + errors
    title, _, *table = printed.splitlines()
    assert "FLUX.1, float32, on cpu:2; 128x96 px, 9 text tokens" in title
    rows = [re.split(r" {2,}", row.strip()) for row in table[:8]]
    assert [row[:4] for row in rows[:3]] == [
        ["1", "ulysses 1 x ring 1", "exact", "exact"],
        ["2", "ulysses 2 x ring 1", "exact", "exact"],
        ["2", "ulysses 1 x ring 2", "exact", "exact"],
    ]
    assert [row[2:4] for row in rows[3:]] == [
        ["int8", "exact"],
        ["fp8", "exact"],
        ["exact", "fp8"],
        ["int8", "fp8"],
        ["fp8", "fp8"],
    ]
    assert all(float(row[5]) > 0 and float(row[7]) > 0 and float(row[8]) > 0 for row in rows)
    assert float(rows[5][8]) < float(rows[0][8])  # in fp8 the weights are smaller
    assert rows[0][6] == "1.00" and rows[4][9] == "gloo, fp8 wire"
    assert any(line.startswith("Recommended, without loss: gpus = cpu:") for line in table[8:])


def test_demo_draws_what_its_caption_says(run, tmp_path):
    code, printed, errors, closed = run("demo", "--output", str(tmp_path))
    assert (code, closed) == (0, [1, 2]), printed + errors
    assert "checked in pixels: the picture is what its caption says" in printed
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.size == (3 * 256, 256)


@pytest.mark.thorough
def test_demo_fails_where_the_ranks_differ(run, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TOLERANCE", -1)
    code, printed, _, _ = run("demo", "--output", str(tmp_path))
    assert code == 1 and "the ranks do not agree" in printed and "the picture is what" in printed


def test_demo_fails_where_the_caption_is_not_met(run, tmp_path, monkeypatch):
    given, other = demo.shapes.prompt, demo.shapes.Caption.read("a blue square left of a red circle")
    monkeypatch.setattr(demo.shapes, "prompt", lambda captions: given([other]))
    code, printed, _, _ = run("demo", "--output", str(tmp_path))
    assert code == 1 and "rounding" in printed and "checked in pixels: the red circle" in printed


def test_doctor():
    command = [sys.executable, "-m", "fastusp_backend", "doctor", "--gpus", "cpu:2", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    trials = {check["name"]: check for check in told["checks"] if check["name"].startswith("trial")}
    assert list(trials) == ["trial, one rank", "trial, ulysses 2 x ring 1", "trial, ulysses 1 x ring 2"]
    assert "started in" in trials["trial, one rank"]["text"]
    for check in list(trials.values())[1:]:
        assert re.search(r"gloo, exact wire; differs from one rank by \d\.\de[-+]\d\d", check["text"]), check
    assert told["facts"]["probe"]["torch"] == str(torch.__version__)


def test_trials_have_a_limit(new_pool, dev, monkeypatch):
    """Workers that hang are ended, while they start and later, and the error holds what is known of them."""
    monkeypatch.setattr(requests, "CANCEL_SECONDS", 0.2)
    pool, said, one = new_pool(1), [], Layout(ulysses=1, ring=1)
    job = Job(spec_of(dev), (GIVEN.x, PROMPT), 60.0, said.append)
    began = time.monotonic()
    with pytest.raises(PoolError, match="gave no result within 0.1 s: their processes did not end"):
        replace(job, seconds=0.1).run(pool, one)
    assert time.monotonic() - began < 10 and said == ["ulysses 1 x ring 1: starting 1 worker(s) on cpu:1"]
    assert pool.status()["state"] == "off"
    short = Bench(spec=job.spec, given=job.given, steps=1, seconds=0.1)
    row = short.measured(Row(layout=one, settings=Settings()), pool)
    assert row.seconds is None and "gave no result within 0.1 s" in row.problem

    assert job.run(pool, one)[1] > 0
    assert job.run(pool, one)[1] is None
    wait_until(lambda: any("request 2 (Sample) took" in line for line in pool.log_since(0)[0]), 20)  # behind the answer
    os.kill(pids(pool)[0], signal.SIGSTOP)
    known = r"(?s)within 1 s.*Rank 0 was in:\n  File .*Last log lines:.*request 2 \(Sample\) took"
    with pytest.raises(PoolError, match=known):
        replace(job, seconds=1.0).run(pool, one)
    assert pool.status()["state"] == "off"


@pytest.mark.parametrize(
    "more, said",
    [
        (["--gpus", "cpu:1"], "Give --gpus two or more devices, such as cpu:2"),
        (["--output", "/proc/nowhere"], "Give --output a folder that can be made"),
    ],
)
def test_demo_refuses_before_it_draws(run, more, said):
    code, printed, errors, closed = run("demo", *more)
    assert code != 0 and said in errors and not closed and not printed
