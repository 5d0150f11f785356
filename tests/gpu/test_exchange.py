"""Memory that processes share, alone and with NCCL between machines: joint attention equals one rank's, for all
layouts, shapes, wires and graph replays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastusp_backend.environment import inherited

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SCRIPT = Path(__file__).with_name("joint_attention.py")
SHARED = "symmetric memory", "host memory"


@pytest.mark.parametrize("ranks, layouts", [(2, 2), (4, 3)])
@pytest.mark.parametrize("kind", SHARED)
def test_joint_attention_over_shared_memory(kind, ranks, layouts):
    assert compared(kind, ranks) == ranks * layouts * 5


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four CUDA devices: NCCL takes each for one rank")
@pytest.mark.parametrize("kind", SHARED)
def test_joint_attention_with_nccl_between_machines(kind):
    """Two of two ranks, with a ring that is pipelined and one that is not."""
    assert compared(f"{kind}, nccl between machines", 4) == 4 * 5 * 2


def compared(kind: str, ranks: int) -> int:
    """How many results of joint_attention.py were right, over all ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = inherited(os.environ, SCRIPT.parents[2]) | {"OMP_NUM_THREADS": "1"}
    if torch.cuda.device_count() < ranks:
        env["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    done = subprocess.run([*command, str(SCRIPT), kind], env=env, capture_output=True, text=True, timeout=240)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.count("largest difference")
