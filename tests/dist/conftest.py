"""Pools of gloo ranks: one per number of ranks for the whole session, and fresh ones for tests that harm them."""

import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from support import SMALL

from fastusp_backend.devices import Devices
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import Pool


@pytest.fixture(scope="session", autouse=True)
def run_dirs(tmp_path_factory):
    """Where the run directories of these tests lie, apart from those of other sessions; short, for socket addresses."""
    tmp_path_factory.getbasetemp()
    base = Path(tempfile.mkdtemp(dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(base))
        patch.setenv("TMPDIR", str(base))
        patch.setenv("OMP_NUM_THREADS", "1")  # ranks of several pools share few cores
        # Large tensors go back to the system at once: glibc would keep what an evaluation has freed, and let it go in
        # the middle of a test that limits a rank's memory.
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
        yield base / f"fastusp-{os.getuid()}"
    shutil.rmtree(base)


@pytest.fixture(scope="session")
def dev(tmp_path_factory):
    """A small model with guidance."""
    path = tmp_path_factory.mktemp("models") / "dev.safetensors"
    write_checkpoint(str(path), SMALL, seed=1)
    return path


@pytest.fixture(scope="session")
def schnell(tmp_path_factory):
    """A smaller one without guidance."""
    path = tmp_path_factory.mktemp("models") / "schnell.safetensors"
    write_checkpoint(str(path), replace(SMALL, guidance=False, double_blocks=1, single_blocks=1), seed=2)
    return path


@pytest.fixture(scope="session")
def shared_pool(run_dirs):
    """shared_pool(ranks): warm from its first use to the end of the session."""
    pools: dict[int, Pool] = {}

    def of(ranks: int) -> Pool:
        if ranks not in pools:
            pools[ranks] = Pool(Devices(ranks=ranks))
        return pools[ranks]

    yield of
    with ThreadPoolExecutor() as threads:
        list(threads.map(Pool.close, pools.values()))


@pytest.fixture
def park():
    """park(pool): parks its weights. They come back otherwise aligned than those of a mapped file, and are from then on
    alike: what is to be equal to the bit is computed behind the first `park`, or before it. After the test they go, so
    that others begin with mapped ones."""
    pools: list[Pool] = []

    def of(pool: Pool) -> None:
        pool.park()
        pools.append(pool)

    yield of
    for pool in pools:
        pool.release()


@pytest.fixture
def new_pool(run_dirs):
    """new_pool(ranks): started, closed after the test."""
    pools: list[Pool] = []

    def start(ranks: int) -> Pool:
        pools.append(Pool(Devices(ranks=ranks)))
        pools[-1].start()
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()
