"""The command line on CPU ranks: `verify` measures each lossy option, and finds that the ranks agree."""

import re
import subprocess
import sys

import pytest
from pools import ROOT

pytestmark = pytest.mark.dist


def test_verify(dev):
    command = [sys.executable, "-m", "fastusp_backend", "verify", str(dev), "--gpus", "cpu:2"]
    command += ["--size", "128", "--text", "9", "--steps", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = {
        line[:42].strip(): [float(x) for x in re.findall(r"[0-9.]+e-[0-9]+", line)]
        for line in done.stdout.splitlines()[2:]
    }
    lossy = ["fp8 wire", "int8 wire", "fp8 products", "int8 wire and fp8 products"]
    lossy = [f"{name}, against exact" for name in lossy]
    assert list(figures) == [*lossy, "2 ranks, against one"]
    assert figures[lossy[1]][0] < figures[lossy[0]][0]
    for name in lossy:
        assert len(figures[name]) == 4 and all(1e-4 < x < 0.1 for x in figures[name]), name
    assert all(x < 2e-5 for x in figures["2 ranks, against one"])


def test_a_file_that_is_none_is_named():
    command = [sys.executable, "-m", "fastusp_backend", "verify", "/nowhere.safetensors", "--gpus", "cpu:1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "there is no model file /nowhere.safetensors" in done.stdout
