"""Stands where nvidia-ml-py's module is looked for, and tells of the GPUs in the variable FAKE_NVML, a JSON object:

gpus: a list of objects (`USUAL` has their defaults); null is a GPU that is another user's.
init: the name of the error that nvmlInit raises, or `crash`, or `hang`.
log: a file that gets a line each time that a process asks.
"""

import json
import os
import signal
import time
from types import SimpleNamespace

USUAL = {
    "name": "NVIDIA H200",
    "compute_capability": [9, 0],
    "memory": [143771 << 20, 143000 << 20],  # total, free; null: not told
    "compute_mode": 0,
    "utilisation": None,  # percent; null: not told
    "temperature": None,  # null: not told
    "pcie": None,  # generation, lanes; null: not told
    "mig": None,  # 0 or 1; null: the GPU has no such mode
    "ancestors": {},  # by the other GPU's index: a level
    "nvlinks": [],  # of each link: the index of the GPU behind it, "switch", or null where it is down
}

NVML_COMPUTEMODE_DEFAULT, NVML_COMPUTEMODE_EXCLUSIVE_THREAD = 0, 1
NVML_COMPUTEMODE_PROHIBITED, NVML_COMPUTEMODE_EXCLUSIVE_PROCESS = 2, 3
NVML_NVLINK_MAX_LINKS = 36
NVML_TEMPERATURE_GPU = 0
NVML_NVLINK_DEVICE_TYPE_GPU, NVML_NVLINK_DEVICE_TYPE_SWITCH = 0, 2
NVML_TOPOLOGY_INTERNAL, NVML_TOPOLOGY_SINGLE, NVML_TOPOLOGY_MULTIPLE = 0, 10, 20
NVML_TOPOLOGY_HOSTBRIDGE, NVML_TOPOLOGY_NODE, NVML_TOPOLOGY_SYSTEM = 30, 40, 50


class NVMLError(Exception):
    pass


class NVMLError_DriverNotLoaded(NVMLError):
    pass


class NVMLError_FunctionNotFound(NVMLError):
    pass


class NVMLError_InvalidArgument(NVMLError):
    pass


class NVMLError_LibraryNotFound(NVMLError):
    pass


class NVMLError_NoPermission(NVMLError):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class NVMLError_Unknown(NVMLError):
    pass


_GIVEN = json.loads(os.environ.get("FAKE_NVML", "{}"))
_GPUS = [
    None if gpu is None else {"index": n, "uuid": f"GPU-{n}"} | USUAL | gpu
    for n, gpu in enumerate(_GIVEN.get("gpus", ()))
]


def nvmlInit():
    if "log" in _GIVEN:
        with open(_GIVEN["log"], "a") as log:
            log.write("asked\n")
    match _GIVEN.get("init"):
        case None:
            return
        case "hang":
            time.sleep(8)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case name:
            raise globals()[name]("Driver Not Loaded")


def nvmlSystemGetDriverVersion():
    return "580.1"


def nvmlDeviceGetCount():
    return len(_GPUS)


def nvmlDeviceGetHandleByIndex(index):
    if _GPUS[index] is None:
        raise NVMLError_NoPermission
    return _GPUS[index]


def nvmlDeviceGetName(gpu):
    return gpu["name"]


def nvmlDeviceGetUUID(gpu):
    return gpu["uuid"]


def nvmlDeviceGetCudaComputeCapability(gpu):
    return _supported(gpu["compute_capability"])


def nvmlDeviceGetMemoryInfo(gpu):
    total, free = _supported(gpu["memory"])
    return SimpleNamespace(total=total, free=free)


def nvmlDeviceGetUtilizationRates(gpu):
    return SimpleNamespace(gpu=_supported(gpu["utilisation"]))


def nvmlDeviceGetTemperature(gpu, sensor):
    return _supported(gpu["temperature"])


def nvmlDeviceGetComputeMode(gpu):
    return _supported(gpu["compute_mode"])


def nvmlDeviceGetMigMode(gpu):
    return [_supported(gpu["mig"]), 0]


def nvmlDeviceGetMaxPcieLinkGeneration(gpu):
    return _supported(gpu["pcie"])[0]


def nvmlDeviceGetMaxPcieLinkWidth(gpu):
    return _supported(gpu["pcie"])[1]


def nvmlDeviceGetPciInfo(gpu):
    return SimpleNamespace(domain=0, bus=gpu["index"], device=0)


def nvmlDeviceGetTopologyCommonAncestor(gpu, other):
    return _supported(gpu["ancestors"].get(str(other["index"])))


def nvmlDeviceGetNvLinkState(gpu, link):
    if not gpu["nvlinks"]:
        raise NVMLError_NotSupported
    if link >= len(gpu["nvlinks"]):
        raise NVMLError_InvalidArgument
    return int(gpu["nvlinks"][link] is not None)


def nvmlDeviceGetNvLinkRemoteDeviceType(gpu, link):
    behind = gpu["nvlinks"][link]
    return NVML_NVLINK_DEVICE_TYPE_SWITCH if behind == "switch" else NVML_NVLINK_DEVICE_TYPE_GPU


def nvmlDeviceGetNvLinkRemotePciInfo(gpu, link):
    return SimpleNamespace(domain=0, bus=gpu["nvlinks"][link], device=0)


def _supported(value):
    if value is None:
        raise NVMLError_NotSupported("Not Supported")
    return value
