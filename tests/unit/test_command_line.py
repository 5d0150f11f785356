"""The command line answers a wrong input with its message and exit status 2, not with a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastusp_backend.__main__ import COMMANDS, main

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", [["demo"], ["plan"], ["bench", "x.safetensors"], ["verify", "x.safetensors"]])
def test_gpus_that_do_not_exist(monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", ["fastusp_backend", *command, "--gpus", "77,78"])
    assert main() == 2
    told = capsys.readouterr()
    assert "gpus = '77,78', and GPUs 77, 78 do not exist" in told.err and not told.out
    assert told.err.startswith(("Set 'cpu:N'", "Name GPUs of this machine"))


def test_a_word_that_the_demo_does_not_know(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastusp_backend", "demo", "--prompt", "a pink dog"])
    assert main() == 2
    said = capsys.readouterr().err
    assert said.startswith("Use the demo model's words: a, small") and "It does not know 'pink', 'dog'" in said


def test_without_a_command_all_are_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastusp_backend"])
    assert main() == 2
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {text}" in said for name, text in COMMANDS.items())


@pytest.mark.parametrize(
    "package, remedy",
    [
        ("msgspec", f"{sys.executable} -m pip install -r {ROOT}/requirements.txt"),
        ("torch", "Install torch as pytorch.org"),
    ],
)
def test_a_package_that_is_not_installed(tmp_path, package, remedy):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "fastusp_backend", "serve", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith(remedy) and done.stderr.count("\n") == 1, done.stderr
    assert package in done.stderr.partition(": ")[2]


def test_doctor_starts_where_torch_is_broken(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('broken')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "fastusp_backend", "doctor", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "cpu:N" in done.stdout, done.stderr
