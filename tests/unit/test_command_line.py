"""The command line answers a wrong input with its message and exit status 2, not with a traceback."""

import sys

import pytest

from fastusp_backend.__main__ import main

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("command", [["demo"], ["plan"], ["bench", "x.safetensors"], ["verify", "x.safetensors"]])
def test_gpus_that_do_not_exist(monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", ["fastusp_backend", *command, "--gpus", "77,78"])
    assert main() == 2
    told = capsys.readouterr()
    assert told.err.startswith("gpus = '77,78': GPUs 77, 78 do not exist. This machine has") and not told.out
