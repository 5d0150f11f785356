"""`benchmarks/scale.py`: one rank's share of more GPUs than there are runs to its end, over either link."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("peers", [True, False], ids=["peer access", "no peer access"])
@pytest.mark.parametrize(
    ("processes", "options", "counts"),
    [
        (2, ["--gpus", "1,2,4"], ["1", "2, real", "2, played", "4"]),
        (1, ["--gpus", "1,2,4"], ["1", "2", "4"]),
        (1, ["--gpus", "2,4", "--ring", "2"], ["2", "4"]),
    ],
    ids=["two GPUs", "one", "one, a ring"],
)
def test_a_share_of_four(processes, options, counts, peers):
    """A message that nobody sends would be waited for for ever."""
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} CUDA devices")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["benchmarks/scale.py", "--tiny", *options, "--size", "512", "--text", "64", "--count", "2"]
    link = {} if peers else {"NCCL_P2P_DISABLE": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | link, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows = [re.split(r" {2,}", line.strip()) for line in ran.stdout.splitlines()]
    times = {row[0]: float(row[2]) for row in rows if len(row) == 10 and row[0] != "GPUs"}
    assert list(times) == counts and min(times.values()) > 0, ran.stdout
    assert f"64 tokens, {'peer access' if peers else 'no peer access'}" in ran.stdout
    assert re.search(r"it (stops scaling at|scales to) \d GPUs|from \d GPUs on", ran.stdout)
