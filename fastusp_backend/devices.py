"""The `gpus` input: which devices make up a pool.

`auto` = the largest set of identical GPUs, else one CPU rank, `all` = every visible GPU, `0,1,3` = by nvidia-smi
index, `cpu:N` = N CPU ranks.
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
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .errors import DeviceError

log = logging.getLogger(__name__)

MAX_CPU_RANKS = 16
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


@functools.cache
def list_gpus() -> tuple[Gpu, ...]:
    """All GPUs of the machine in nvidia-smi order; empty where there is no nvidia-smi. Asked once a process.

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
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"nvidia-smi does not answer ({error}); use 'cpu:N' for N CPU ranks") from error
    if "No devices were found" in answer.stdout + answer.stderr:
        return ()
    if answer.returncode != 0:
        text = (answer.stderr or answer.stdout).strip()
        raise DeviceError(f"nvidia-smi failed: {text}. Reinstall the driver, or use 'cpu:N' for N CPU ranks")
    rows = csv.reader(answer.stdout.splitlines(), skipinitialspace=True)
    try:
        return tuple(make(*row) for row in rows)
    except (TypeError, ValueError) as error:
        raise DeviceError(f"nvidia-smi's answer is not understood: {answer.stdout.strip()}") from error


def visible_gpus(gpus: tuple[Gpu, ...], visible: str | None) -> tuple[Gpu, ...]:
    """Those of `gpus` that a CUDA_VISIBLE_DEVICES value leaves; None leaves all."""
    if visible is None:
        return gpus
    names = [x.strip() for x in visible.split(",") if x.strip()]
    return tuple(
        g for g in gpus if str(g.index) in names or any(g.uuid.startswith(n) for n in names if not n.isdigit())
    )


def parse_devices(
    text: str, *, gpus: tuple[Gpu, ...] | None = None, visible: str | None = None, seen_by_torch: int = 0
) -> Devices:
    """Reads a `gpus` input. `gpus` and `visible` default to this machine's. seen_by_torch: how many GPUs the caller's
    torch sees, where it has one.

    Raises DeviceError naming the value and what exists.
    """
    if gpus is None:
        gpus = () if text.strip().lower().startswith("cpu") else list_gpus()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = visible_gpus(gpus, visible)
    value = text.strip().lower()

    if match := re.fullmatch(r"cpu(?::(\d+))?", value):
        ranks = int(match[1] or 1)
        if not 1 <= ranks <= MAX_CPU_RANKS:
            raise DeviceError(f"gpus = {text!r}: between 1 and {MAX_CPU_RANKS} CPU ranks can be used")
        return Devices(ranks=ranks)
    if value == "auto":
        if not seen and seen_by_torch:
            lacks = "names none of those that CUDA_VISIBLE_DEVICES leaves" if gpus else "is not found, or names none"
            raise DeviceError(
                f"gpus = {text!r}: torch sees {seen_by_torch} GPU{'s' * (seen_by_torch > 1)}, but nvidia-smi, which "
                f"FastUSP asks for NVIDIA GPUs, {lacks}. Put it on ComfyUI's PATH (in a container: "
                f"NVIDIA_DRIVER_CAPABILITIES=compute,utility), or use 'cpu:N' for N CPU ranks"
            )
        if not seen:
            _tell_of_no_gpu()
            return Devices(ranks=1)
        name = Counter(g.name for g in seen).most_common(1)[0][0]
        return _of(tuple(g.index for g in seen if g.name == name))
    if value == "all":
        if not seen:
            raise DeviceError(f"gpus = {text!r}: no GPU is visible here; use 'cpu:N' for N CPU ranks")
        return _of(tuple(g.index for g in seen))
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


def local_devices(text: str) -> Devices:
    """`parse_devices` where torch works, and may see GPUs that nvidia-smi does not name."""
    import torch  # not above: doctor reads `gpus` where torch is broken

    return parse_devices(text, seen_by_torch=torch.cuda.device_count())


@functools.cache
def _tell_of_no_gpu() -> None:
    """Once a process."""
    log.warning("FastUSP: gpus = 'auto': no GPU is visible here, so one CPU rank serves; 'cpu:N' takes N")


def _of(indices: tuple[int, ...]) -> Devices:
    return Devices(ranks=len(indices), gpus=indices)


def holds_gpu(devices: Devices, uuid: str) -> bool:
    """Whether the GPU of this uuid, as torch or nvidia-smi write it, is one of `devices`. Indices would not do: torch
    counts those that CUDA_VISIBLE_DEVICES leaves, in CUDA_DEVICE_ORDER."""
    bare = uuid.lower().removeprefix("gpu-")
    return any(g.index in devices.gpus and g.uuid.lower().removeprefix("gpu-") == bare for g in list_gpus())


def supports_bfloat16(devices: Devices) -> bool:
    """Whether every device computes bfloat16 natively (compute capability 8.0); CPU ranks compute in float32
    instead."""
    by_index = {g.index: g for g in list_gpus()}
    return bool(devices.gpus) and all(by_index[i].compute_capability >= (8, 0) for i in devices.gpus)
