"""Plain requests import nothing: a rank that runs out of memory in the middle of an import has to end."""

import pytest
from pools import evaluate, run_dir, sample

from fastusp_backend.pool import Progress
from fastusp_backend.protocol import channel

pytestmark = pytest.mark.dist

WATCH = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if os.path.exists("watched"):  # ranks run in the run directory
            with open("imports", "a") as file:
                file.write(name + chr(10))

if "FASTUSP_RUN_DIR" in os.environ:  # torchrun, whose forks the ranks are
    sys.meta_path.insert(0, Watch())
    open("watching", "w").close()
"""


def test_a_first_request_of_each_kind_imports_nothing(new_pool, dev, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pool = new_pool(2)
    directory = run_dir(pool)
    pool._ready_workers(Progress())
    pool.release()  # they serve from here on
    (directory / "watched").touch()
    evaluate(pool, dev)
    sample(pool, dev)
    monkeypatch.setattr(channel, "INLINE_LIMIT", 0)  # from here on tensors come in shared memory
    evaluate(pool, dev)
    pool.park()
    evaluate(pool, dev)
    pool.release()
    assert (directory / "watching").exists()
    found = (directory / "imports").read_text().split() if (directory / "imports").exists() else []
    assert not found, found[:20]
