"""What `doctor` makes of the facts: functions of `Facts` alone, a check each."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ...devices import Devices
from .facts import Facts

TORCH = 2, 7
"""The oldest torch, as in nodes/comfyui.py."""
PYTHON = 3, 10
BFLOAT16, FP8 = (8, 0), (8, 9)
"""Compute capabilities from which GPUs compute in these types."""
SHARED_MEMORY = 256 << 20
"""What NCCL asks of /dev/shm stays below, for 8 GPUs; Docker gives 64 MiB."""
HOST_MEMORY = 4 << 30
DESCRIPTORS = 1024

_WORST_LAST = ("ok", "warn", "fail")


@dataclass(frozen=True, slots=True)
class Check:
    """advice: what to do, where something is not as it should be."""

    name: str
    status: Literal["ok", "warn", "fail"]
    text: str
    advice: str = ""

    def __str__(self) -> str:
        lines = [f"{self.status:4s}  {self.name}: {self.text}", *(self.advice.splitlines() if self.advice else [])]
        return "\n      -> ".join(lines[:2]) + "".join(f"\n         {line}" for line in lines[2:])


def worst(checks: list[Check]) -> str:
    return max((check.status for check in checks), key=_WORST_LAST.index, default="ok")


def verdict(checks: list[Check], devices: Devices | None) -> str:
    """What all of it comes to. devices: those that were examined, None if there are none."""
    failed, warned = ([c.name for c in checks if c.status == status] for status in ("fail", "warn"))
    if failed:
        text = f"FastUSP does not work here yet: fix {', '.join(failed)}"
    else:
        text = "FastUSP works here" + f"; look at {', '.join(warned)}" * bool(warned)
    if devices is not None and devices.ranks == 1 and not devices.gpus:
        text += ". One CPU rank shares nothing: --gpus cpu:2 tries how ranks work together"
    return text


def system(facts: Facts) -> Check:
    text = f"{facts.system} {facts.release}{', in a container' * facts.container}, {facts.cpus} CPUs"
    if facts.system == "Windows":
        return Check("system", "fail", text, "NCCL does not exist for native Windows: run ComfyUI in WSL 2")
    if facts.system != "Linux":
        return Check("system", "fail", text, "FastUSP runs on Linux, or on Windows through WSL 2")
    if "microsoft" in facts.release.lower():
        text += ": WSL 2, where GPUs do not map each other's memory and little host memory can be pinned"
    return Check("system", "ok", text)


def python(facts: Facts) -> Check:
    text = ".".join(map(str, facts.python))
    if facts.python[:2] < PYTHON:
        return Check("python", "fail", text, "FastUSP needs Python 3.10 or newer")
    return Check("python", "ok", text)


def packages(facts: Facts) -> Check:
    if missing := facts.probe.missing:
        advice = "pip install -r requirements.txt, with the Python that runs ComfyUI"
        text = "; ".join(f"{name} ({problem})" for name, problem in missing.items())
        return Check("packages", "fail", f"cannot be imported: {text}", advice)
    return Check("packages", "ok", ", ".join(f"{name} {version}" for name, version in facts.packages.items()))


def torch(facts: Facts) -> Check:
    probe = facts.probe
    if not probe.torch:
        return Check("torch", "fail", probe.error, "Install the torch that ComfyUI's own instructions name")
    text = f"{probe.torch}, CUDA {probe.cuda or 'none'}" + (f", NCCL {probe.nccl}" if probe.nccl else "")
    if tuple(map(int, probe.torch.split(".")[:2])) < TORCH:
        return Check("torch", "fail", text, "FastUSP needs torch 2.7 or newer: update ComfyUI's torch")
    if not facts.gpus:
        return Check("torch", "ok", text)
    if probe.cuda is None:
        return Check("torch", "fail", f"{text}: a build without CUDA", "Install a CUDA build: pytorch.org lists them")
    if probe.error:
        driver = facts.states[0].driver if facts.states else "unknown"
        advice = f"The driver ({driver}) may be too old for CUDA {probe.cuda}, or was updated since the machine started"
        return Check("torch", "fail", f"{text}: {probe.error}", advice)
    if len(probe.names) < len(facts.gpus):
        advice = "Compare with nvidia-smi; in a container, all GPUs must be passed on (--gpus all)"
        return Check("torch", "fail", f"{text}: it sees {len(probe.names)} of {len(facts.gpus)} GPUs", advice)
    foreign = [g for g in facts.gpus if not runs_on(probe.architectures, g.compute_capability)]
    if foreign:
        text += f": made for {', '.join(probe.architectures)}, not for {foreign[0].name}"
        return Check("torch", "fail", text, "Install a torch build of a CUDA version that knows this GPU")
    return Check("torch", "ok", text)


def runs_on(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for these (`sm_90`: this major version from this minor on; `compute_90`: all newer) runs there."""
    for name in architectures:
        if match := re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name):
            built = int(match[2]), int(match[3])
            if built <= capability and (match[1] == "compute" or built[0] == capability[0]):
                return True
    return False


def triton(facts: Facts) -> Check:
    if not facts.gpus:
        return Check("triton", "ok", f"{facts.probe.triton or 'none'}; CPU ranks do not need it")
    if not facts.probe.triton:
        problem = facts.probe.triton_problem or "not found"
        return Check("triton", "fail", problem, "torch's CUDA builds for Linux bring it: install torch anew")
    return Check("triton", "ok", facts.probe.triton)


def compiler(facts: Facts) -> Check:
    name = facts.compiler or "none"
    if not facts.compiler_problem:
        return Check("C compiler", "ok", f"{name} builds an extension of this Python")
    if not facts.gpus:
        return Check("C compiler", "ok", f"{facts.compiler_problem}; CPU ranks do not need one")
    major, minor = facts.python[:2]
    advice = "Triton needs one: apt install gcc, or set CC"
    if "Python.h" in facts.compiler_problem:
        advice = f"Triton needs Python's headers: apt install python{major}.{minor}-dev"
    return Check("C compiler", "fail", f"{name}: {facts.compiler_problem}", advice)


def visible(facts: Facts) -> list[Check]:
    """What CUDA_VISIBLE_DEVICES does to gpus = auto and all."""
    if not facts.visible:
        return []
    if facts.visible_problem or not facts.gpus:
        advice = "Fix it, unset it, or name GPUs by nvidia-smi's index: --gpus 0,1"
        return [Check("visible GPUs", "warn", facts.visible, advice)]
    return [Check("visible GPUs", "ok", facts.visible)]


def gpus(facts: Facts) -> list[Check]:
    if not facts.gpus and facts.wanted == "auto" and not facts.visible:
        advice = (
            "Where there are some: install NVIDIA's driver with its libnvidia-ml.so.1 (in a container: set\n"
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility); else name --gpus cpu:N"
        )
        return [Check("devices", "warn", "no GPU is found", advice)]
    if not facts.gpus:
        return [Check("devices", "ok", f"{facts.devices}; no GPU takes part")]
    kinds: dict[str, list[str]] = {}
    for gpu in facts.gpus:
        kinds.setdefault(gpu.name, []).append(str(gpu.index))
    text = "; ".join(f"{name} ({', '.join(indices)})" for name, indices in kinds.items())
    found = [Check("devices", "ok", text)]
    if len(kinds) > 1:
        advice = "Ranks share the work equally, so the slowest sets the pace: gpus = auto takes identical ones"
        found = [Check("devices", "warn", f"{text}: not identical", advice)]
    return found + [_state(facts, gpu) for gpu in facts.gpus]


def _state(facts: Facts, gpu) -> Check:
    name = f"GPU {gpu.index}"
    state = next((x for x in facts.states if x.index == gpu.index), None)
    if state is None:
        return Check(name, "fail", "NVML does not tell its state", "Look at nvidia-smi; reinstall the driver")
    major, minor = gpu.compute_capability
    types = ["bfloat16"] * ((major, minor) >= BFLOAT16) + ["fp8 products"] * ((major, minor) >= FP8)
    told = state.free is not None and state.total is not None
    memory = f"{state.free / 1e9:.1f} of {state.total / 1e9:.1f} GB free" if told else "NVML tells no memory size"
    text = f"{memory}, compute capability {major}.{minor}"
    text += f" ({' and '.join(types) or 'neither bfloat16 nor fp8 products'}), driver {state.driver}"
    if state.compute_mode == "Prohibited":
        return Check(name, "fail", f"{text}, compute mode Prohibited", f"nvidia-smi -i {gpu.index} -c DEFAULT")
    if state.mig:
        advice = "NCCL does not join GPU instances: turn MIG off, or leave this GPU out"
        return Check(name, "fail", f"{text}, MIG on", advice)
    if state.compute_mode.startswith("Exclusive"):
        advice = f"A worker and ComfyUI cannot share it: nvidia-smi -i {gpu.index} -c DEFAULT, or leave this GPU out"
        return Check(name, "warn", f"{text}, compute mode {state.compute_mode}", advice)
    if told and 2 * state.free < state.total:
        return Check(name, "warn", text, "Other programs hold more than half of it: nvidia-smi lists them")
    if (major, minor) < BFLOAT16:
        return Check(
            name, "warn", text, "Models that do not compute in float16 compute in float32 here: slow, and large"
        )
    return Check(name, "ok", text)


def links(facts: Facts) -> list[Check]:
    """How each pair of GPUs is joined."""
    indices = [gpu.index for gpu in facts.gpus]
    if len(indices) < 2 or len(facts.probe.peers) < len(indices):
        return []
    # The probe saw the devices in their own order, whatever nvidia-smi's is.
    place = {index: n for n, index in enumerate(facts.devices.gpus)}
    found = []
    for a, i in enumerate(indices):
        for j in indices[a + 1 :]:
            peers = facts.probe.peers[place[i]][place[j]] and facts.probe.peers[place[j]][place[i]]
            found.append(_link(f"GPU {i} - GPU {j}", facts.links.get(f"{i}-{j}", ""), peers, facts.iommu))
    return found


def _link(name: str, word: str, peers: bool, iommu: bool) -> Check:
    how = f"NVLink ({word})" if word.startswith("NV") else f"PCIe ({word})" if word else "unknown path"
    if not peers:
        advice = (
            "Exchanges go through host memory: set wire = auto or int8 in USP Optimization Settings, and let "
            "`bench` say whether more GPUs pay"
        )
        return Check(name, "warn", f"{how}, no peer access", advice)
    if iommu and not word.startswith("NV"):
        return Check(
            name,
            "warn",
            f"{how}, peer access, and an IOMMU is active",
            "With an IOMMU or ACS, peer copies over PCIe can hang or be wrong, which the trial below would show; then\n"
            "turn them off (BIOS, or intel_iommu=off / amd_iommu=off), or set NCCL_P2P_DISABLE=1: host memory instead",
        )
    return Check(name, "ok", f"{how}, peer access")


def symmetric_memory(facts: Facts) -> list[Check]:
    if len(facts.gpus) < 2 or not facts.probe.symmetric:
        return []
    problem = next(filter(None, facts.probe.symmetric), "")
    if problem:
        advice = "Update the driver, or set NCCL_P2P_DISABLE=1: exchanges then go through host memory"
        return [Check("symmetric memory", "warn", problem, advice)]
    return [Check("symmetric memory", "ok", "can be allocated on all GPUs")]


def shared_memory(facts: Facts) -> Check:
    if facts.memfd_problem:
        advice = (
            "Ranks share tensors by memfd_create, sealed, and /proc/PID/fd: the container or sandbox must allow both"
        )
        return Check("shared memory", "fail", facts.memfd_problem, advice)
    if facts.shm_free is None:
        text = "memfd works, there is no /dev/shm"
    else:
        text = f"memfd works, /dev/shm has {facts.shm_free / 1e9:.2f} GB free"
    if len(facts.gpus) > 1 and (facts.shm_free or 0) < SHARED_MEMORY:
        return Check("shared memory", "warn", text, "NCCL may need more: docker run --shm-size=1g, or --ipc=host")
    return Check("shared memory", "ok", text)


def host_memory(facts: Facts) -> list[Check]:
    if facts.host_free is None:
        return []
    text = f"{facts.host_free / 1e9:.1f} GB available"
    if facts.host_free < HOST_MEMORY:
        advice = "Each worker takes 1 GB or more with CUDA; residency = park needs room for the weights beside that"
        return [Check("host memory", "warn", text, advice)]
    return [Check("host memory", "ok", text)]


def limits(facts: Facts) -> Check:
    locked = "unlimited" if facts.locked is None else f"{facts.locked >> 10} KiB"
    text = f"ulimit -n {facts.descriptors or 'unlimited'}, ulimit -l {locked} (CUDA's pinned memory is not bound by it)"
    if facts.descriptors is not None and facts.descriptors < DESCRIPTORS:
        return Check("limits", "warn", text, f"Raise the open files before ComfyUI starts: ulimit -n {4 * DESCRIPTORS}")
    return Check("limits", "ok", text)


def temporary_folder(facts: Facts) -> Check:
    if facts.run_dir_problem:
        advice = "The pool's socket and logs lie there: set TMPDIR to a folder of your own on a Linux file system"
        return Check("temporary folder", "fail", f"{facts.temporary}: {facts.run_dir_problem}", advice)
    return Check("temporary folder", "ok", f"{facts.temporary}: holds a private folder with a socket")


_ADVICE = {
    "NCCL_P2P_DISABLE": "Exchanges go through host memory, which is slower where GPUs map each other's",
    "NCCL_SHM_DISABLE": "NCCL then uses the network inside this machine: unset it",
}


def environment(facts: Facts) -> list[Check]:
    env = facts.environment
    text = ", ".join(f"{name}={value}" for name, value in env.items()) or "nothing that matters is set"
    if facts.dropped:
        text += f"; not handed to the workers as it is: {', '.join(facts.dropped)}"
    slow = [name for name in _ADVICE if env.get(name, "0") != "0"]
    if slow and len(facts.gpus) > 1:
        return [Check("environment", "warn", text, "\n".join(f"{name}: {_ADVICE[name]}" for name in slow))]
    return [Check("environment", "ok", text)]


CHECKS: tuple[Callable[[Facts], Check | list[Check]], ...] = (
    system,
    python,
    packages,
    torch,
    triton,
    compiler,
    visible,
    gpus,
    links,
    symmetric_memory,
    shared_memory,
    host_memory,
    limits,
    temporary_folder,
    environment,
)


def examine(facts: Facts) -> list[Check]:
    found = []
    for check in CHECKS:
        made = check(facts)
        found += [made] if isinstance(made, Check) else made
    return found
