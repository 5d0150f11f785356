"""A remote model in the host's memory management, where a worker has the host's own GPU (see sharing.py)."""

import os
import subprocess

import pytest
from comfy import REPOSITORY
from workflows import DEV

pytestmark = [pytest.mark.host, pytest.mark.any_host]


def test_a_shared_gpu(host):
    python = os.environ.get("COMFYUI_PYTHON") or str(host.path / "venv/bin/python")
    script, file = REPOSITORY / "tests/host/sharing.py", host.base / "models/diffusion_models" / DEV
    command = [python, str(script), str(host.path), str(REPOSITORY), str(file)]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=host.base, timeout=200)
    assert answer.stdout.endswith("done\n"), answer.stderr[-3000:]
