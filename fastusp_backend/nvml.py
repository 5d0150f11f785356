"""What NVML, the driver's library below nvidia-smi, tells of this machine's GPUs.

`python -m fastusp_backend.nvml gpus` (or `states`, `loads`, `links`) prints it as JSON; `ask` runs that in a process of
its own, for the reasons that `command` gives. Indices are nvidia-smi's. Looking initialises no CUDA.
"""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .command import ask_module
from .errors import DeviceError

SECONDS = 30.0
"""The driver takes some where nothing keeps it awake."""
_CPU = "use 'cpu:N' for N CPU ranks"


def ask(question: str) -> Any:
    """Returns the answer to `gpus`, `states`, `loads` or `links`: what the function of that name returns, [] without a
    driver.

    Raises DeviceError where the driver, or the Python package nvidia-ml-py, fails.
    """
    try:
        answer = ask_module("fastusp_backend.nvml", question, seconds=SECONDS)
    except OSError as error:
        remedy = "Restart the machine or reinstall the driver"
        if "pynvml" in str(error):  # it is missing, or another package's
            remedy = "Run pip install --force-reinstall nvidia-ml-py with the Python that runs ComfyUI"
        text = str(error).rstrip(".")
        raise DeviceError(
            f"{remedy}, or {_CPU}: NVML, the library that reports NVIDIA's GPUs, failed: {text}"
        ) from error
    return json.loads(answer.splitlines()[-1])


def gpus(nvml) -> list[dict]:
    """Returns index, name, uuid and compute_capability of each GPU."""
    return [
        {
            "index": index,
            "name": nvml.nvmlDeviceGetName(gpu),
            "uuid": nvml.nvmlDeviceGetUUID(gpu),
            "compute_capability": nvml.nvmlDeviceGetCudaComputeCapability(gpu),
        }
        for index, gpu in _handles(nvml)
    ]


def states(nvml) -> list[dict]:
    """Returns the fields of `devices.GpuState` for each GPU."""
    modes = {
        nvml.NVML_COMPUTEMODE_DEFAULT: "Default",
        nvml.NVML_COMPUTEMODE_EXCLUSIVE_THREAD: "Exclusive_Thread",
        nvml.NVML_COMPUTEMODE_PROHIBITED: "Prohibited",
        nvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS: "Exclusive_Process",
    }
    driver = nvml.nvmlSystemGetDriverVersion()
    found = []
    for index, gpu in _handles(nvml):
        memory = _told(nvml, nvml.nvmlDeviceGetMemoryInfo, gpu)  # not told where GPUs share the host's memory
        mig = _told(nvml, nvml.nvmlDeviceGetMigMode, gpu)
        # The most that GPU and slot are made for: an idle GPU lowers what is in use.
        generation = _told(nvml, nvml.nvmlDeviceGetMaxPcieLinkGeneration, gpu)
        width = _told(nvml, nvml.nvmlDeviceGetMaxPcieLinkWidth, gpu)
        found.append(
            {
                "index": index,
                "total": memory.total if memory else None,
                "free": memory.free if memory else None,
                "compute_mode": modes.get(_told(nvml, nvml.nvmlDeviceGetComputeMode, gpu), "unknown"),
                "mig": bool(mig and mig[0]),
                "pcie": (generation, width) if generation and width else None,
                "driver": driver,
            }
        )
    return found


def loads(nvml) -> list[dict]:
    """Returns of each GPU what it does just now: index and name; used and total bytes of its memory, by everybody;
    utilisation, the percent of the last moment in which a kernel ran; temperature in degrees Celsius. None for what is
    not told."""
    found = []
    for index, gpu in _handles(nvml):
        memory = _told(nvml, nvml.nvmlDeviceGetMemoryInfo, gpu)
        rates = _told(nvml, nvml.nvmlDeviceGetUtilizationRates, gpu)
        found.append(
            {
                "index": index,
                "name": nvml.nvmlDeviceGetName(gpu),
                "used": memory.total - memory.free if memory else None,
                "total": memory.total if memory else None,
                "utilisation": rates.gpu if rates else None,
                "temperature": _told(nvml, nvml.nvmlDeviceGetTemperature, gpu, nvml.NVML_TEMPERATURE_GPU),
            }
        )
    return found


def links(nvml) -> dict[str, str]:
    """Returns 'i-j' (i < j) -> the path between two GPUs in the words of `nvidia-smi topo -m`, such as NV18 or PIX.

    Pairs of which nothing is told, as in some virtual machines, are left out.
    """
    ancestors = {
        nvml.NVML_TOPOLOGY_INTERNAL: "PIX",
        nvml.NVML_TOPOLOGY_SINGLE: "PIX",
        nvml.NVML_TOPOLOGY_MULTIPLE: "PXB",
        nvml.NVML_TOPOLOGY_HOSTBRIDGE: "PHB",
        nvml.NVML_TOPOLOGY_NODE: "NODE",
        nvml.NVML_TOPOLOGY_SYSTEM: "SYS",
    }
    found = {}
    handles = list(_handles(nvml))
    for n, (i, gpu) in enumerate(handles):
        for j, other in handles[n + 1 :]:
            nvlinks = _nvlinks(nvml, gpu, other)
            ancestor = _told(nvml, nvml.nvmlDeviceGetTopologyCommonAncestor, gpu, other)
            if word := f"NV{nvlinks}" if nvlinks else ancestors.get(ancestor):
                found[f"{i}-{j}"] = word
    return found


def _nvlinks(nvml, gpu, other) -> int:
    """Counts a GPU's active NVLinks that lead to another GPU, or to a switch, and so to all."""
    count = 0
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        if _told(nvml, nvml.nvmlDeviceGetNvLinkState, gpu, link):
            kind = _told(nvml, nvml.nvmlDeviceGetNvLinkRemoteDeviceType, gpu, link)
            if kind == nvml.NVML_NVLINK_DEVICE_TYPE_GPU:
                ends = (
                    _told(nvml, nvml.nvmlDeviceGetNvLinkRemotePciInfo, gpu, link),
                    _told(nvml, nvml.nvmlDeviceGetPciInfo, other),
                )
                count += all(ends) and _place(ends[0]) == _place(ends[1])
            else:
                count += kind == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH
    return count


def _place(pci) -> tuple[int, int, int]:
    return pci.domain, pci.bus, pci.device


def _handles(nvml) -> Iterator[tuple[int, Any]]:
    """Yields (index, handle) of each GPU, less those that a job scheduler's cgroup keeps from this user."""
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            yield index, nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError_NoPermission:
            continue


def _told(nvml, function: Callable[..., Any], *arguments) -> Any:
    """Calls a function of NVML; returns None where the GPU or the driver has no such thing, or does not tell it to
    this user."""
    untold = nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission, nvml.NVMLError_InvalidArgument
    try:
        return function(*arguments)
    except (*untold, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_Unknown):
        return None


def main() -> None:
    import pynvml  # not above: that it is missing is told by `ask`

    question = {"gpus": gpus, "states": states, "loads": loads, "links": links}[sys.argv[1]]
    try:
        pynvml.nvmlInit()
        answer = question(pynvml)
    except pynvml.NVMLError_LibraryNotFound:  # no driver, or a container without its utilities
        answer = []
    except pynvml.NVMLError as error:
        sys.exit(str(error))
    try:
        print(json.dumps(answer))
    except TypeError as error:
        sys.exit(f"this pynvml is none of nvidia-ml-py's, or an old one: {error}")


if __name__ == "__main__":
    main()
