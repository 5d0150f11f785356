"""What torchrun's process does for its forks, the ranks."""

import os

import pytest

from fastusp_backend.worker import __main__ as worker
from fastusp_backend.worker import forked, launch, torchrun
from fastusp_backend.worker.process import PARENT_VARIABLE, RUN_DIR_VARIABLE

pytestmark = pytest.mark.unit

NAMES = "CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK"


@pytest.mark.parametrize("theirs", ["0", None])
def test_gpus_are_seen_by_the_ranks_alone(monkeypatch, tmp_path, theirs):
    """Who asks CUDA for them must not be forked, and torchrun would ask."""
    begins, seen = [], {}

    def run(arguments, run_dir):
        seen["torchrun"] = tuple(map(os.environ.get, NAMES))
        with pytest.raises(SystemExit):
            begins[0]()
        return 0

    def leave(code):
        raise SystemExit(code)

    def work():
        seen["a rank"] = tuple(map(os.environ.get, NAMES))
        return 0

    for name, value in {PARENT_VARIABLE: "1", RUN_DIR_VARIABLE: str(tmp_path), "CUDA_VISIBLE_DEVICES": "GPU-1"}.items():
        monkeypatch.setenv(name, value)
    if theirs is not None:
        monkeypatch.setenv(NAMES[1], theirs)
    monkeypatch.setattr(launch, "die_with_parent", lambda parent: None)
    monkeypatch.setattr(launch, "leave", leave)
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker, "main", work)
    monkeypatch.setattr(forked, "start_by_fork", begins.append)
    monkeypatch.setattr(torchrun, "run", run)
    assert launch.main([]) == 0
    assert seen == {"torchrun": ("", "1"), "a rank": ("GPU-1", theirs)}
