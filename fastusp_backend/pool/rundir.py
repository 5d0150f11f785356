"""A pool's run directory: control socket, key, logs. Its owner holds a lock on it; one without an owner is swept.

It lies at <temporary directory>/fastusp-<uid>/<token>, readable by the user alone. Everything that a pool writes is
in it, torchrun's own files too, so removing it removes all traces, also those of a process that was killed with
SIGKILL.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from pathlib import Path

from ..errors import PoolError

# sockaddr_un holds 108 bytes; what follows the base is 1 + 12 + len("/control.sock").
_LONGEST_BASE = 80
_SETTLING_SECONDS = 60
_NAME = re.compile("[0-9a-f]{12}")


def _base() -> Path:
    name = f"fastusp-{os.getuid()}"
    base = Path(tempfile.gettempdir()) / name
    if len(os.fsencode(base)) > _LONGEST_BASE:
        base = Path("/tmp") / name
    base.mkdir(mode=0o700, exist_ok=True)
    info = base.lstat()  # never through a link that another user may have planted
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise PoolError(f"Remove {base}, or set TMPDIR to a directory of your own: it is not private to this user")
    return base


class RunDir:
    """Creates a fresh run directory and sweeps those whose owners are gone."""

    def __init__(self):
        """Raises PoolError where none can be made; nothing is left of it then."""
        self.path: Path | None = None
        self._lock = self._directory = -1
        try:
            self._make()
        except OSError as error:
            self.remove()
            raise PoolError(
                f"Free space and inodes for temporary files, or set TMPDIR to another directory: "
                f"{self.path or 'a run directory'} cannot be made: {error}"
            ) from error

    def _make(self) -> None:
        base = _base()
        sweep(base)
        self.path = base / secrets.token_hex(6)
        self.path.mkdir(mode=0o700)
        self._directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._directory, fcntl.LOCK_EX)  # what cleans temporary folders respects that, or takes the other
        # Locked before it has its name: a sweep by another process never meets it without its owner.
        self._lock = os.open(self.path / "lock.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.rename(self.path / "lock.new", self.path / "lock")
        self.key = secrets.token_bytes(32)
        fd = os.open(self.path / "key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(self.key)

    @property
    def address(self) -> str:
        return str(self.path / "control.sock")

    def remove(self) -> None:
        """Removes the directory. May be called twice."""
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        for fd in (self._lock, self._directory):
            if fd >= 0:
                os.close(fd)
        self._lock = self._directory = -1


def sweep(base: Path) -> None:
    """Removes run directories that no process owns any more."""
    for path in base.iterdir():
        if not _NAME.fullmatch(path.name) or _is_locked(path):
            continue  # not ours, or its owner lives
        try:
            fd = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except NotADirectoryError:
            continue
        except FileNotFoundError:
            # Perhaps just being made, and not locked yet; perhaps just swept by another process.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _SETTLING_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # its owner lives
        finally:
            os.close(fd)


def _is_locked(directory: Path) -> bool:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
