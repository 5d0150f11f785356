"""CUDA_VISIBLE_DEVICES, read as CUDA reads it; `python -m fastusp_backend.visible` prints all GPUs as CUDA counts them.

Its rules (CUDA Programming Guide, environment variables; torch.cuda counts devices likewise): entries are taken in
order, up to the first that names no GPU; behind that nothing is read, so that -1 hides the rest. Entries are numbers,
of which what follows the digits is ignored, or beginnings of UUIDs that fit one GPU alone, as the first entry is; a GPU
that is named twice leaves none at all. Numbers count in CUDA's own order, which CUDA_DEVICE_ORDER chooses: by default
FASTEST_FIRST, of which only the first GPU is documented. So the driver is asked for that order, by a process of its
own (`command`).
"""

import ctypes
import os
import re
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .command import ask_module
from .errors import DeviceError
from .once import Once

VARIABLE = "CUDA_VISIBLE_DEVICES"
SECONDS = 60.0
"""CUDA initialises a machine of 8 GPUs in a few seconds, where no driver is kept awake."""
_NO_DEVICE = 100


class Visible(NamedTuple):
    """The GPUs that a value leaves."""

    uuids: tuple[str, ...]
    """In CUDA's order."""
    problem: str = ""
    """What in the value CUDA does not take; empty where it takes all."""


def read(value: str, uuids: Sequence[str], counted: Callable[[], Sequence[str]]) -> Visible:
    """Reads a value of CUDA_VISIBLE_DEVICES.

    uuids: all GPUs.
    counted: gives them as CUDA counts them; called for numbers alone.
    Raises DeviceError for parts of GPUs (MIG), and as `counted`.
    """
    if value.startswith("MIG-"):
        raise DeviceError(f"Name whole GPUs in {VARIABLE}, or unset it: {VARIABLE}={value} names a part of a GPU (MIG)")
    found: list[str] = []
    for entry in value.split(","):
        named = _by_uuid(entry, uuids) if value.startswith("GPU-") else _by_number(entry, counted)
        if named is None:
            rest = f"reads nothing from {entry.strip()!r} on, which names no GPU"
            return Visible(tuple(found), rest if entry.strip() not in ("", "-1") else "")
        if named in found:
            return Visible((), f"takes no GPU at all, since {entry.strip()!r} names one that was named before")
        found.append(named)
    return Visible(tuple(found))


def _by_uuid(entry: str, uuids: Sequence[str]) -> str | None:
    entry = entry.strip().lower()
    fitting = [uuid for uuid in uuids if uuid.lower().startswith(entry) or entry.startswith(uuid.lower())]
    return fitting[0] if len(fitting) == 1 and entry.startswith("gpu-") else None


def _by_number(entry: str, counted: Callable[[], Sequence[str]]) -> str | None:
    number = re.match(r"\s*\+?(\d+)", entry, re.ASCII)
    if not number:
        return None
    order = counted()
    return order[int(number[1])] if int(number[1]) < len(order) else None


@Once
def counted_by_cuda() -> tuple[str, ...]:
    """Returns the UUIDs of all GPUs as CUDA counts them in this process's environment.

    Raises DeviceError where the driver does not answer.
    """
    try:
        return tuple(ask_module("fastusp_backend.visible", seconds=SECONDS, without=(VARIABLE,)).split())
    except OSError as error:
        value = os.environ.get(VARIABLE)
        what, there = "cuda:N", ""
        if value is not None:
            what, there = f"{VARIABLE}={value}", f"by UUID in {VARIABLE} (nvidia-smi -L), or "
        raise DeviceError(
            f"Name GPUs {there}by nvidia-smi's index in gpus: {what} counts GPUs as CUDA does, and CUDA's driver does "
            f"not tell how ({error})"
        ) from error


def _count() -> list[str]:
    """Asks the driver, without a context on any GPU. Raises OSError where there is none, or it fails."""
    driver = ctypes.CDLL("libcuda.so.1")
    status = driver.cuInit(0)
    if status == _NO_DEVICE:
        return []
    _check(status)
    count, device, identity = ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    _check(driver.cuDeviceGetCount(ctypes.byref(count)))
    found = []
    for number in range(count.value):
        _check(driver.cuDeviceGet(ctypes.byref(device), number))
        _check(driver.cuDeviceGetUuid(identity, device))
        found.append(f"GPU-{uuid.UUID(bytes=bytes(identity))}")
    return found


def _check(status: int) -> None:
    if status:
        raise OSError(f"CUDA error {status}")


if __name__ == "__main__":
    print(*_count(), sep="\n")
