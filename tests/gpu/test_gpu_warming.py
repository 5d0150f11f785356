"""A rank's libraries start while ranks connect, and nothing is left of it but them, in a process that has not used
them; what they take is taken before it is counted."""

import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
        reason="before Hopper attention is not among what is started",
    ),
]

PROGRAM = """
import logging, torch
import torch.nn.functional as F
from fastusp_backend.attention.local import choose
from fastusp_backend.engine import Engine, Warming
logging.basicConfig(level=logging.INFO)
device = torch.device("cuda", 0)
engine = Engine(device, Warming(device))
engine.release()  # as for a first model: at once
assert torch.cuda.memory_reserved() < 2**22, torch.cuda.memory_summary()
free = torch.cuda.mem_get_info(device)[0]
x = torch.randn(4608, 3072, dtype=torch.bfloat16, device=device)
q = x.view(1, 4608, 24, 128)
F.linear(x, x[:1024], x[:1024, 0].contiguous()), choose("auto", device, q.dtype, (24, 128))[1](q, q, q, 1.0)
del x, q
engine.release()
taken = free - torch.cuda.mem_get_info(device)[0]
assert taken < 2**25, taken
"""


def test_it_succeeds_and_libraries_alone_stay():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "failed" not in ended.stderr, ended.stderr
