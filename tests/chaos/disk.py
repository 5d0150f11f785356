"""A small disk of this process's own, which faults may fill."""

import ctypes
import os
from pathlib import Path

_NEW_MOUNTS, _PRIVATE = 0x00020000, 1 << 18 | 1 << 14  # CLONE_NEWNS; MS_PRIVATE, MS_REC

_libc = ctypes.CDLL(None, use_errno=True)


def mount_small(folder: Path, megabytes: int) -> str:
    """Mounts a tmpfs there that this process and its children alone see, and that goes with them. Why that cannot be
    had here; empty where it is there."""
    options = f"size={megabytes}m,mode=700".encode()
    for call in (
        lambda: _libc.unshare(_NEW_MOUNTS),
        lambda: _libc.mount(None, b"/", None, ctypes.c_ulong(_PRIVATE), None),
        lambda: _libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(0), options),
    ):
        if call() != 0:
            return f"no small disk can be mounted here ({os.strerror(ctypes.get_errno())}; root can)"
    return ""


def unmount(folder: Path) -> None:
    _libc.umount2(os.fsencode(folder), 2)  # MNT_DETACH


def fill(folder: Path, free: int) -> None:
    """Leaves about so many bytes."""
    with open(folder / "filler", "ab") as file:
        left = os.statvfs(folder)
        size = left.f_bavail * left.f_frsize - free
        if size > 0:
            os.posix_fallocate(file.fileno(), file.tell(), size)


def empty(folder: Path) -> None:
    (folder / "filler").unlink(missing_ok=True)
