"""Memory that processes share: joint attention equals one rank's, for all layouts, shapes, wires and graph replays."""

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


@pytest.mark.parametrize("ranks, layouts", [(2, 2), (4, 3)])
@pytest.mark.parametrize("kind", ["symmetric memory", "host memory"])
def test_joint_attention_over_shared_memory(kind, ranks, layouts):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = inherited(os.environ, SCRIPT.parents[2]) | {"OMP_NUM_THREADS": "1"}
    if torch.cuda.device_count() < ranks:
        env["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    done = subprocess.run([*command, str(SCRIPT), kind], env=env, capture_output=True, text=True, timeout=240)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("largest difference") == ranks * layouts * 3
