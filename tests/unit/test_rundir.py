"""Run directories are private, and a sweep removes those alone whose owners are gone."""

import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from support import open_descriptors

from fastusp_backend.errors import PoolError
from fastusp_backend.pool import rundir
from fastusp_backend.pool.rundir import RunDir, sweep

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def temporary(monkeypatch):
    """A temporary directory of this test's own, as short as socket addresses need it."""
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    yield path
    shutil.rmtree(path)


def mode(path) -> int:
    return os.stat(path).st_mode & 0o777


def owner(temporary: Path) -> tuple[subprocess.Popen, Path]:
    """A process that owns a run directory, and the directory."""
    program = (
        "from fastusp_backend.pool.rundir import RunDir\n"
        "import time\n"
        "directory = RunDir()\n"
        "print(directory.path, flush=True)\n"
        "time.sleep(60)"
    )
    env = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=env)
    return process, Path(process.stdout.readline().strip())


def test_everything_is_private(temporary):
    old = os.umask(0)
    try:
        directory = RunDir()
    finally:
        os.umask(old)
    assert directory.path.parent == temporary / f"fastusp-{os.getuid()}"
    assert mode(directory.path.parent) == mode(directory.path) == 0o700
    assert mode(directory.path / "key") == mode(directory.path / "lock") == 0o600
    assert (directory.path / "key").read_bytes() == directory.key and len(directory.key) == 32
    assert len(os.fsencode(directory.address)) < 108
    other = RunDir()
    assert other.path != directory.path and other.key != directory.key
    directory.remove()
    directory.remove()
    assert not directory.path.exists() and other.path.exists()
    other.remove()


def test_a_base_that_others_can_read_is_refused(temporary):
    base = temporary / f"fastusp-{os.getuid()}"
    base.mkdir()
    base.chmod(0o755)
    with pytest.raises(PoolError, match="set TMPDIR"):
        RunDir()


def test_a_long_temporary_directory_is_not_used(monkeypatch, temporary):
    long = temporary / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    directory = RunDir()
    assert directory.path.is_relative_to("/tmp") and len(os.fsencode(directory.address)) < 108
    directory.remove()


@pytest.mark.parametrize("part", ["fastusp-", "", "lock.new", "lock", "key"])
def test_where_a_part_cannot_be_made_nothing_is_left(temporary, monkeypatch, part):
    base = temporary / f"fastusp-{os.getuid()}"

    def refusing(real, place=0):
        def call(*given, **options):
            name = Path(given[place]).name
            if name == part or (part == "" and rundir._NAME.fullmatch(name)) or (part[-1:] == "-" and part in name):
                raise OSError(errno.ENOSPC, "No space left on device", str(given[place]))
            return real(*given, **options)

        return call

    if part != "fastusp-":
        base.mkdir(mode=0o700)
    monkeypatch.setattr(rundir.os, "open", refusing(os.open))
    monkeypatch.setattr(rundir.os, "mkdir", refusing(os.mkdir))
    monkeypatch.setattr(rundir.os, "rename", refusing(os.rename, 1))
    before = open_descriptors()
    with pytest.raises(PoolError, match=f"Free space .* TMPDIR .* cannot be made: .*No space left.*{base}"):
        RunDir()
    monkeypatch.undo()
    assert open_descriptors() <= before and not (base.exists() and list(base.iterdir()))


def test_where_nothing_can_be_written_nothing_is_left(temporary):
    (temporary / f"fastusp-{os.getuid()}").mkdir(mode=0o700)
    before, limits = open_descriptors(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(PoolError, match=f"TMPDIR .* {temporary}/.* cannot be made: .*File too large"):
            RunDir()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert open_descriptors() == before and not list((temporary / f"fastusp-{os.getuid()}").iterdir())


def test_the_lock_is_not_handed_to_children(temporary):
    directory = RunDir()
    child = subprocess.Popen(["sleep", "30"], close_fds=False)
    try:
        for fd in (directory._lock, directory._directory):
            os.close(fd)
        directory._lock = directory._directory = -1
        sweep(directory.path.parent)
        assert not directory.path.exists()
    finally:
        child.kill()
        child.wait()


def test_a_directory_goes_with_its_owner(temporary):
    process, path = owner(temporary)
    try:
        RunDir().remove()
        assert (path / "key").exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert path.exists()
        RunDir().remove()
        assert not path.exists()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_directory_without_a_lock_goes_when_it_is_old(temporary):
    mine = RunDir()
    base = mine.path.parent
    young, old, foreign = base / ("a" * 12), base / ("b" * 12), base / "something else"
    foreign.mkdir()
    os.utime(foreign, (0, 0))
    young.mkdir()
    old.mkdir()
    (old / "lock.new").touch()
    past = time.time() - 1000
    os.utime(old, (past, past))
    (base / "a file").write_text("not ours")
    sweep(base)
    assert (
        young.exists() and foreign.exists() and not old.exists() and mine.path.exists() and (base / "a file").exists()
    )
    mine.remove()


def test_a_sweep_at_the_moment_of_birth_removes_nothing(temporary, monkeypatch):
    real = fcntl.flock

    def flock(fd, how):
        if how == fcntl.LOCK_EX:
            sweep(temporary / f"fastusp-{os.getuid()}")
        real(fd, how)

    monkeypatch.setattr(rundir.fcntl, "flock", flock)
    directory = RunDir()
    assert (directory.path / "key").exists() and (directory.path / "lock").exists()
    directory.remove()


def test_a_directory_whose_lock_was_cleaned_away_is_its_owners_still(temporary):
    directory = RunDir()
    (directory.path / "lock").unlink()
    os.utime(directory.path, (0, 0))
    sweep(directory.path.parent)
    assert directory.path.exists()
    directory.remove()
    assert not directory.path.exists()
