"""A rank's libraries start while ranks connect, and nothing is left of it but them: in a process that has not used
them."""

import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROGRAM = """
import logging, sys, torch
from fastusp_backend.engine import Engine, Warming
logging.basicConfig(level=logging.INFO)
device = torch.device("cuda", 0)
engine = Engine(device, Warming(device))
engine.release()  # as for a first model: at once
assert torch.cuda.memory_reserved() < 2**22, torch.cuda.memory_summary()
"""


def test_it_succeeds_and_its_memory_is_given_back():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "failed" not in ended.stderr, ended.stderr
