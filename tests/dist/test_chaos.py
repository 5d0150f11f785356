"""A short run of the chaos command, see docs/reliability.md: what must be so after any fault is so after these."""

import os
import subprocess
import sys

import pytest
from pools import ROOT

pytestmark = pytest.mark.dist

KINDS = "cancel,interrupt,kill,files,memory,descriptors"


@pytest.mark.thorough
def test_faults_of_many_kinds():
    """One of each, in an order and at moments that the seed decides."""
    command = [sys.executable, "-m", "tests.chaos", "--gpus", "cpu:2", "--seed", "7", "--kinds", KINDS]
    command += ["--faults", "6", "--seconds", "30", "--models", "2"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hangs 0, orphans 0, wrong latents 0, findings 0" in done.stdout
