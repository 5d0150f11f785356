"""The `gpus` input: which devices make up a pool.

`auto` = the largest set of identical GPUs, else one CPU rank, `all` = every visible GPU, both in CUDA_VISIBLE_DEVICES'
order (`visible.py`), else in nvidia-smi's; `0,1,3` = by nvidia-smi index, whatever is visible; `cpu:N` = N CPU ranks.
NVML tells of GPUs (`nvml.py`), by nvidia-smi's index, so that looking at them initialises no CUDA in the host.
"""

import functools
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from . import nvml
from . import visible as cuda
from .device_sets import Devices, ServerDevices
from .errors import DeviceError
from .once import Once
from .visible import counted_by_cuda

log = logging.getLogger(__name__)

MAX_CPU_RANKS = 16
SET_CPU_RANKS = "Set 'cpu:N' for N CPU ranks"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    index: int
    name: str
    uuid: str
    compute_capability: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuState:
    """What changes, and what only diagnosis and predictions ask for."""

    index: int
    total: int | None
    """Bytes of memory; None where NVML does not tell them, as of GPUs that share the host's memory."""
    free: int | None
    """Bytes of it that nobody has; None likewise."""
    compute_mode: str
    """In nvidia-smi's words: `Default`, `Exclusive_Process`, `Prohibited`."""
    mig: bool
    """Whether the GPU is cut into instances."""
    driver: str
    """The driver's version."""
    pcie: tuple[int, int] | None = None
    """Generation and lanes of PCIe that GPU and slot are made for; None where NVML does not tell them."""


@Once
def list_gpus() -> tuple[Gpu, ...]:
    """Returns all GPUs of the machine by nvidia-smi's index; none where there is no driver, or no NVML of it.

    Raises DeviceError where NVML fails.
    """
    return tuple(Gpu(**gpu | {"compute_capability": tuple(gpu["compute_capability"])}) for gpu in nvml.ask("gpus"))


def gpu_states() -> tuple[GpuState, ...]:
    """Returns the GPUs of `list_gpus` as they are now. Raises DeviceError likewise."""
    states = nvml.ask("states")
    return tuple(GpuState(**state | {"pcie": state["pcie"] and tuple(state["pcie"])}) for state in states)


def gpu_loads() -> list[dict]:
    """Returns what GPUs do just now, as `nvml.loads` does. Raises DeviceError likewise."""
    return nvml.ask("loads")


def gpu_links() -> dict[str, str]:
    """Returns how pairs of GPUs are joined, as `nvml.links` does. Raises DeviceError likewise."""
    return dict(nvml.ask("links"))


class Seen(NamedTuple):
    """What CUDA_VISIBLE_DEVICES leaves visible."""

    gpus: tuple[Gpu, ...]
    """In its order."""
    told: str = ""
    """The same in words; empty where the variable is not set, or there is no GPU."""
    problem: str = ""
    """What of it CUDA does not take."""


def visible_gpus(
    gpus: tuple[Gpu, ...], value: str | None, counted: Callable[[], Sequence[str]] = counted_by_cuda
) -> Seen:
    """Picks those of `gpus` that a CUDA_VISIBLE_DEVICES value leaves; None leaves all. counted: as `visible.read` takes
    it.

    Raises DeviceError where it cannot be told.
    """
    if value is None or not gpus:
        return Seen(gpus)
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    uuids = list(by_uuid)
    left = cuda.read(value, uuids, counted if len(gpus) > 1 else lambda: uuids)
    if foreign := [uuid for uuid in left.uuids if uuid not in by_uuid]:
        raise DeviceError(
            f"Name GPUs of nvidia-smi -L in {cuda.VARIABLE}, or by nvidia-smi's index in gpus: {cuda.VARIABLE}={value} "
            f"leaves {foreign[0]}, which NVML does not name"
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
    servers: str = "",
) -> Devices:
    """Reads a `gpus` input.

    gpus, visible: all GPUs and CUDA_VISIBLE_DEVICES; this machine's where they are not given.
    counted: as for `visible_gpus`.
    seen_by_torch: how many GPUs the caller's torch sees, where it has one.
    servers: what the caller takes beside it, in words, which an error names.

    Raises DeviceError saying what to set, what exists, and the value.
    """
    value = text.strip().lower()
    if match := re.fullmatch(r"cpu(?::([0-9]{1,9}))?", value):
        ranks = int(match[1] or 1)
        if not 1 <= ranks <= MAX_CPU_RANKS:
            raise DeviceError(f"Set 1 to {MAX_CPU_RANKS} CPU ranks, as in 'cpu:2': gpus = {text!r} asks for {ranks}")
        return Devices(ranks=ranks)
    if gpus is None:
        gpus, visible = list_gpus(), os.environ.get(cuda.VARIABLE)
    if value in ("auto", "all"):
        try:
            seen = visible_gpus(gpus, visible, counted)
        except DeviceError as error:
            raise DeviceError(f"{error} (gpus = {text!r})") from error
        if not seen.gpus:
            return _without_gpus(text, seen, seen_by_torch)
        names = [gpu.name for gpu in seen.gpus]
        most = Counter(names).most_common(1)[0][0]
        if value == "auto" and set(names) != {most}:
            _tell_of_others(most, tuple(f"{gpu.index} ({gpu.name})" for gpu in seen.gpus if gpu.name != most))
        return _of(tuple(gpu.index for gpu in seen.gpus if value == "all" or gpu.name == most))
    if re.fullmatch(r"cuda:[0-9]{1,9}(\s*,\s*(cuda:)?[0-9]{1,9})*", value):
        return _of(_counted_by_cuda(text, [int(x) for x in re.findall(r"\d+", value)], gpus, visible, counted))
    if re.fullmatch(r"[0-9]{1,9}(\s*,\s*[0-9]{1,9})*", value):
        wanted = tuple(int(x) for x in value.split(","))
        existing = {g.index for g in gpus}
        missing = [i for i in wanted if i not in existing]
        if missing:
            have = ", ".join(f"{g.index} ({g.name})" for g in gpus)
            todo = f"Name GPUs of this machine, {have}" if have else f"{SET_CPU_RANKS}, as there is no GPU here"
            some = f"GPU {missing[0]} does" if len(missing) == 1 else f"GPUs {', '.join(map(str, missing))} do"
            raise DeviceError(f"{todo}: gpus = {text!r}, and {some} not exist")
        return _of(_each_once(text, wanted))
    local = "'auto', 'all', GPU numbers such as '0,1' or 'cuda:0,1'"
    todo = f"{local}, 'cpu:N' for N CPU ranks, or {servers}" if servers else f"{local}, or 'cpu:N' for N CPU ranks"
    raise DeviceError(f"Set {todo}: gpus = {text!r} is not understood")


def _each_once(text: str, wanted: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(wanted)) != len(wanted):
        raise DeviceError(f"Name each GPU once, since each rank needs its own: gpus = {text!r} has one named twice")
    return wanted


def _counted_by_cuda(
    text: str, numbers: list[int], gpus: tuple[Gpu, ...], visible: str | None, counted: Callable[[], Sequence[str]]
) -> tuple[int, ...]:
    """The indices, as NVML counts, of GPUs that torch calls cuda:0, cuda:1, ..."""
    found = gpus  # equal ones are counted alike by both
    if visible is not None or len({gpu.name for gpu in gpus}) > 1:
        everyone = ",".join(map(str, range(len(gpus))))
        try:
            found = visible_gpus(gpus, everyone if visible is None else visible, counted).gpus
        except DeviceError as error:
            raise DeviceError(f"{error} (gpus = {text!r})") from error
    if missing := [number for number in numbers if number >= len(found)]:
        have = ", ".join(f"cuda:{n} ({gpu.name})" for n, gpu in enumerate(found))
        todo = f"Name GPUs that CUDA counts, {have}" if have else f"{SET_CPU_RANKS}, as CUDA counts no GPU here"
        raise DeviceError(f"{todo}: gpus = {text!r}, and cuda:{missing[0]} does not exist")
    return _each_once(text, tuple(found[number].index for number in numbers))


def _without_gpus(text: str, seen: Seen, seen_by_torch: int) -> Devices:
    """Decides what `auto` and `all` mean where nothing is visible."""
    if text.strip().lower() == "all":
        todo = f"Name other GPUs in {cuda.VARIABLE}, or set" if seen.told else "Set"
        why = seen.told or "no GPU is visible here"
        raise DeviceError(f"{todo} 'cpu:N' for N CPU ranks: gpus = {text!r}, and {why}")
    if seen_by_torch:
        lacks = f"names others ({seen.told})" if seen.told else "is not found, or names none"
        raise DeviceError(
            f"Install the driver's libnvidia-ml.so.1 (in a container: set NVIDIA_DRIVER_CAPABILITIES=compute,utility), "
            f"or set 'cpu:N' for N CPU ranks: gpus = {text!r}, and torch sees {seen_by_torch} "
            f"GPU{'s' * (seen_by_torch > 1)}, but NVML, which FastUSP asks for NVIDIA's GPUs, {lacks}"
        )
    _tell_of_no_gpu(seen.told or "no GPU is visible here")
    return Devices(ranks=1)


def local_devices(text: str, servers: str = "") -> Devices:
    """Calls `parse_devices` where torch works, and may see GPUs that NVML does not name. servers: as there."""
    import torch  # not above: doctor reads `gpus` where torch is broken

    return parse_devices(text, seen_by_torch=torch.cuda.device_count(), servers=servers)


@functools.cache
def _tell_of_no_gpu(why: str) -> None:
    """Warns once a process."""
    log.warning("FastUSP: gpus = 'auto': %s, so one CPU rank is used; 'cpu:N' uses N", why)


@functools.cache
def _tell_of_others(most: str, others: tuple[str, ...]) -> None:
    """Warns once a process: who has unlike cards would wait in vain for all of them to work."""
    log.warning(
        "FastUSP: gpus = 'auto' takes the largest set of identical GPUs, %s; it leaves out %s: 'all' takes them too, "
        "and their numbers some of them",
        most,
        ", ".join(others),
    )


def _of(indices: tuple[int, ...]) -> Devices:
    return Devices(ranks=len(indices), gpus=indices)


def uses_gpu(devices: Devices, uuid: str) -> bool:
    """Tells whether the GPU of this uuid, as torch or NVML write it, is one of `devices`. Indices would not do: torch
    counts those that CUDA_VISIBLE_DEVICES leaves, in CUDA_DEVICE_ORDER."""
    bare = uuid.lower().removeprefix("gpu-")
    return bool(devices.gpus) and any(
        g.index in devices.gpus and g.uuid.lower().removeprefix("gpu-") == bare for g in list_gpus()
    )


def cuda_visible(devices: Devices) -> str:
    """Returns CUDA_VISIBLE_DEVICES for processes that shall see these alone, in this order: by UUID, which means the
    same in every order that CUDA may count in. Raises DeviceError where one does not exist."""
    uuids = {gpu.index: gpu.uuid for gpu in list_gpus()} if devices.gpus else {}
    for index in devices.gpus:
        if index not in uuids:
            have = ", ".join(map(str, uuids))
            todo = f"Name GPUs that NVML names, {have}" if have else f"{SET_CPU_RANKS}, as NVML names no GPU"
            raise DeviceError(f"{todo}: GPU {index} does not exist")
    return ",".join(uuids[index] for index in devices.gpus)


def supports_bfloat16(devices: Devices) -> bool:
    """Tells whether every device computes bfloat16 natively (compute capability 8.0); CPU ranks compute in float32
    instead."""
    if isinstance(devices, ServerDevices):
        return devices.bfloat16
    if not devices.gpus:
        return False  # and nobody asks the driver, which may be what does not work
    by_index = {g.index: g for g in list_gpus()}
    return all(by_index[i].compute_capability >= (8, 0) for i in devices.gpus)
