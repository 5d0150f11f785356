"""Pools of gloo ranks for the whole session: one per number of ranks, and one for tests that harm its processes; fresh
ones where it takes one."""

import multiprocessing.util
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from pools import processes_of, run_dir
from serving import serving
from support import SMALL

from fastusp_backend.devices import Devices
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import Pool


@pytest.fixture(scope="session", autouse=True)
def run_dirs(tmp_path_factory):
    """Where the run directories of these tests lie, apart from those of other sessions; short, for socket addresses."""
    tmp_path_factory.getbasetemp()
    multiprocessing.util.get_temp_dir()  # which goes at the exit of this process, behind `base`
    base = Path(tempfile.mkdtemp(dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(base))
        patch.setenv("TMPDIR", str(base))
        patch.setenv("OMP_NUM_THREADS", "1")  # ranks of several pools share few cores
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


_warm: dict[int | str, Pool] = {}


@pytest.fixture(scope="session")
def shared_pool(run_dirs):
    """shared_pool(ranks): warm from its first use to the last test of this folder."""

    def of(ranks: int) -> Pool:
        if ranks not in _warm:
            _warm[ranks] = Pool(Devices(ranks=ranks))
        return _warm[ranks]

    yield of
    _close_warm()


def _close_warm() -> None:
    """Ends the shared pools: of idle ones nothing is left."""
    directories = [run_dir(pool) for pool in _warm.values() if pool.status()["state"] != "off"]
    with ThreadPoolExecutor() as threads:
        list(threads.map(Pool.close, _warm.values()))
    _warm.clear()
    left = [directory for directory in directories if directory.exists() or processes_of(directory)]
    assert not left, left


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """A ComfyUI of other tests has the cores to itself."""
    if nextitem is None or nextitem.path.parent != item.path.parent:
        _close_warm()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, dev, schnell):
    """The models of `server`, in a folder inside that which it is given."""
    folder = tmp_path_factory.mktemp("server")
    inside = folder / "models" / "flux"
    inside.mkdir(parents=True)
    for path in (dev, schnell):
        shutil.copy(path, inside / path.name)
    return folder


@pytest.fixture(scope="session")
def server(run_dirs, folder):
    """Of two ranks, which no test ends."""
    with serving(folder, "--gpus", "cpu:2", "--models", str(folder / "models")) as server:
        yield server


LOOPS = """
import signal
import time

def loop(number, frame):
    while True:
        time.sleep(0.01)  # and leave the cores to other tests

signal.signal(signal.SIGUSR2, loop)
"""
"""Has every process loop in its main thread on a signal, wherever it is."""


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """A folder with what the processes of `mortal` import first."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(LOOPS)
    return folder


@pytest.fixture(scope="module")
def mortal(run_dirs, site):
    """A pool of two ranks whose processes tests end, halt or limit; the next request starts new ones. It is the same
    for all modules: processes are what costs."""
    if "mortal" not in _warm:
        _warm["mortal"] = Pool(Devices(ranks=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site))
        # Large tensors go back to the system at once: glibc would keep what an evaluation has freed, and let it go in
        # the middle of a test that limits a rank's memory.
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
        yield _warm["mortal"]


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
