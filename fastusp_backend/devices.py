"""The `gpus` input: which devices make up a pool.

`auto` = the largest set of identical GPUs, else one CPU rank, `all` = every visible GPU, both in CUDA_VISIBLE_DEVICES'
order (`visible.py`), else in nvidia-smi's; `0,1,3` = by nvidia-smi index, whatever is visible; `cpu:N` = N CPU ranks.
GPUs are asked of nvidia-smi, so that looking at them initialises no CUDA context in the host.
"""

import csv
import functools
import logging
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from . import visible as cuda
from .errors import DeviceError
from .once import Once, run
from .visible import counted_by_cuda

log = logging.getLogger(__name__)

MAX_CPU_RANKS = 16
SECONDS = 30.0
"""For nvidia-smi, which takes some where no driver is kept awake."""
_REMEDY = "Reinstall the driver, or use 'cpu:N' for N CPU ranks"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    index: int
    name: str
    uuid: str
    compute_capability: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """The devices of one pool, one rank each; it is the pool's key. gpus: nvidia-smi indices, empty for CPU ranks."""

    ranks: int
    gpus: tuple[int, ...] = ()

    @property
    def type(self) -> str:
        return "cuda" if self.gpus else "cpu"

    def first(self, ranks: int) -> "Devices":
        """The first `ranks` of them."""
        return Devices(ranks=ranks, gpus=self.gpus[:ranks])

    def __str__(self) -> str:
        return "gpu " + ",".join(map(str, self.gpus)) if self.gpus else f"cpu:{self.ranks}"


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuState:
    """What changes, and what only diagnosis asks for. total, free: bytes; None where nvidia-smi does not tell them, as
    of GPUs that share the host's memory. compute_mode, driver: in nvidia-smi's words. mig: whether the GPU is cut into
    instances."""

    index: int
    total: int | None
    free: int | None
    compute_mode: str
    mig: bool
    driver: str


@Once
def list_gpus() -> tuple[Gpu, ...]:
    """All GPUs of the machine in nvidia-smi order; empty where there is no nvidia-smi.

    Raises DeviceError where nvidia-smi fails.
    """
    return _query(
        "index,name,uuid,compute_cap",
        lambda i, name, uuid, cc: Gpu(
            index=int(i), name=name, uuid=uuid, compute_capability=tuple(map(int, cc.split(".")))
        ),
    )


def gpu_states() -> tuple[GpuState, ...]:
    """As `list_gpus`, as they are now."""
    return _query(
        "index,memory.total,memory.free,compute_mode,mig.mode.current,driver_version",
        lambda i, total, free, mode, mig, driver: GpuState(
            index=int(i),
            total=_bytes(total),
            free=_bytes(free),
            compute_mode=mode,
            mig=mig == "Enabled",
            driver=driver,
        ),
    )


def _bytes(mebibytes: str) -> int | None:
    return int(mebibytes) << 20 if mebibytes.isdigit() else None  # [N/A], [Insufficient Permissions]


def _query(fields: str, make: Callable[..., T]) -> tuple[T, ...]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    query = [command, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = run(query, SECONDS)
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"nvidia-smi gave no answer within {SECONDS:g} s. {_REMEDY}") from error
    except OSError as error:
        raise DeviceError(f"nvidia-smi cannot be run ({error.strerror or error}). {_REMEDY}") from error
    if "No devices were found" in answer.stdout + answer.stderr:
        return ()
    if answer.returncode != 0:
        text = (answer.stderr.strip() or answer.stdout.strip()).rstrip(".") or f"exit code {answer.returncode}"
        raise DeviceError(f"nvidia-smi failed: {text}. {_REMEDY}")
    rows = csv.reader(answer.stdout.splitlines(), skipinitialspace=True)
    try:
        return tuple(make(*row) for row in rows)
    except (TypeError, ValueError) as error:
        raise DeviceError(f"nvidia-smi's answer is not understood: {answer.stdout.strip()!r}. {_REMEDY}") from error


class Seen(NamedTuple):
    """gpus: what CUDA_VISIBLE_DEVICES leaves, in its order. told: that, in words; empty where it is not set, or there
    is no GPU. problem: what of it CUDA does not take."""

    gpus: tuple[Gpu, ...]
    told: str = ""
    problem: str = ""


def visible_gpus(
    gpus: tuple[Gpu, ...], value: str | None, counted: Callable[[], Sequence[str]] = counted_by_cuda
) -> Seen:
    """Those of `gpus` that a CUDA_VISIBLE_DEVICES value leaves; None leaves all. counted: as `visible.read` takes it.

    Raises DeviceError where it cannot be told.
    """
    if value is None or not gpus:
        return Seen(gpus)
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    uuids = list(by_uuid)
    left = cuda.read(value, uuids, counted if len(gpus) > 1 else lambda: uuids)
    if foreign := [uuid for uuid in left.uuids if uuid not in by_uuid]:
        raise DeviceError(
            f"{cuda.VARIABLE}={value} leaves {foreign[0]}, which nvidia-smi does not name. Name GPUs of nvidia-smi -L "
            f"there, or by nvidia-smi's index in gpus"
        )
    found = tuple(by_uuid[uuid] for uuid in left.uuids)
    indices = ", ".join(str(gpu.index) for gpu in found)
    some = f"GPU{'s' * (len(found) > 1)} {indices} of {len(gpus)}" if found else f"none of {len(gpus)} GPUs"
    told = f"{cuda.VARIABLE}={value} leaves {some}" + (f": CUDA {left.problem}" if left.problem else "")
    return Seen(found, told, left.problem)


def parse_devices(
    text: str,
    *,
    gpus: tuple[Gpu, ...] | None = None,
    visible: str | None = None,
    counted: Callable[[], Sequence[str]] = counted_by_cuda,
    seen_by_torch: int = 0,
) -> Devices:
    """Reads a `gpus` input. `gpus` and `visible`, CUDA_VISIBLE_DEVICES, default to this machine's. counted: as for
    `visible_gpus`. seen_by_torch: how many GPUs the caller's torch sees, where it has one.

    Raises DeviceError naming the value and what exists.
    """
    value = text.strip().lower()
    if match := re.fullmatch(r"cpu(?::(\d+))?", value):
        ranks = int(match[1] or 1)
        if not 1 <= ranks <= MAX_CPU_RANKS:
            raise DeviceError(f"gpus = {text!r}: between 1 and {MAX_CPU_RANKS} CPU ranks can be used")
        return Devices(ranks=ranks)
    if gpus is None:
        gpus, visible = list_gpus(), os.environ.get(cuda.VARIABLE)
    if value in ("auto", "all"):
        try:
            seen = visible_gpus(gpus, visible, counted)
        except DeviceError as error:
            raise DeviceError(f"gpus = {text!r}: {error}") from error
        if not seen.gpus:
            return _without_gpus(text, seen, seen_by_torch)
        names = [gpu.name for gpu in seen.gpus]
        most = Counter(names).most_common(1)[0][0]
        return _of(tuple(gpu.index for gpu in seen.gpus if value == "all" or gpu.name == most))
    if re.fullmatch(r"\d+(\s*,\s*\d+)*", value):
        wanted = tuple(int(x) for x in value.split(","))
        existing = {g.index for g in gpus}
        missing = [i for i in wanted if i not in existing]
        if missing:
            have = ", ".join(f"{g.index} ({g.name})" for g in gpus) or "no GPU at all; use 'cpu:N' for N CPU ranks"
            some = f"GPU {missing[0]} does" if len(missing) == 1 else f"GPUs {', '.join(map(str, missing))} do"
            raise DeviceError(f"gpus = {text!r}: {some} not exist. This machine has {have}")
        if len(set(wanted)) != len(wanted):
            raise DeviceError(f"gpus = {text!r}: a GPU is named twice; each rank needs a GPU of its own")
        return _of(wanted)
    raise DeviceError(
        f"gpus = {text!r} is not understood: expected 'auto', 'all', GPU indices such as '0,1', or 'cpu:N'"
    )


def _without_gpus(text: str, seen: Seen, seen_by_torch: int) -> Devices:
    """What `auto` and `all` mean where nothing is visible."""
    if text.strip().lower() == "all":
        why = f"{seen.told}. Name others there, or" if seen.told else "no GPU is visible here;"
        raise DeviceError(f"gpus = {text!r}: {why} use 'cpu:N' for N CPU ranks")
    if seen_by_torch:
        lacks = f"names others ({seen.told})" if seen.told else "is not found, or names none"
        raise DeviceError(
            f"gpus = {text!r}: torch sees {seen_by_torch} GPU{'s' * (seen_by_torch > 1)}, but nvidia-smi, which "
            f"FastUSP asks for NVIDIA GPUs, {lacks}. Put it on ComfyUI's PATH (in a container: "
            f"NVIDIA_DRIVER_CAPABILITIES=compute,utility), or use 'cpu:N' for N CPU ranks"
        )
    _tell_of_no_gpu(seen.told or "no GPU is visible here")
    return Devices(ranks=1)


def local_devices(text: str) -> Devices:
    """`parse_devices` where torch works, and may see GPUs that nvidia-smi does not name."""
    import torch  # not above: doctor reads `gpus` where torch is broken

    return parse_devices(text, seen_by_torch=torch.cuda.device_count())


@functools.cache
def _tell_of_no_gpu(why: str) -> None:
    """Once a process."""
    log.warning("FastUSP: gpus = 'auto': %s, so one CPU rank serves; 'cpu:N' takes N", why)


def _of(indices: tuple[int, ...]) -> Devices:
    return Devices(ranks=len(indices), gpus=indices)


def holds_gpu(devices: Devices, uuid: str) -> bool:
    """Whether the GPU of this uuid, as torch or nvidia-smi write it, is one of `devices`. Indices would not do: torch
    counts those that CUDA_VISIBLE_DEVICES leaves, in CUDA_DEVICE_ORDER."""
    bare = uuid.lower().removeprefix("gpu-")
    return any(g.index in devices.gpus and g.uuid.lower().removeprefix("gpu-") == bare for g in list_gpus())


def cuda_visible(devices: Devices) -> str:
    """CUDA_VISIBLE_DEVICES for processes that shall see these alone, in this order: by UUID, which means the same in
    every order that CUDA may count in. Raises DeviceError where one does not exist."""
    uuids = {gpu.index: gpu.uuid for gpu in list_gpus()} if devices.gpus else {}
    for index in devices.gpus:
        if index not in uuids:
            raise DeviceError(f"GPU {index} does not exist: nvidia-smi names {', '.join(map(str, uuids)) or 'none'}")
    return ",".join(uuids[index] for index in devices.gpus)


def supports_bfloat16(devices: Devices) -> bool:
    """Whether every device computes bfloat16 natively (compute capability 8.0); CPU ranks compute in float32
    instead."""
    by_index = {g.index: g for g in list_gpus()}
    return bool(devices.gpus) and all(by_index[i].compute_capability >= (8, 0) for i in devices.gpus)
