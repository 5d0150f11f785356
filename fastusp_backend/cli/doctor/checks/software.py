"""Whether the system, Python and its packages, torch and its compilers will do."""

import re

from ..check import Check
from ..facts import Facts

TORCH = 2, 7
"""The oldest torch, as in nodes/comfyui.py."""
PYTHON = 3, 10


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
    """Tells whether code for these architectures runs on a GPU. `sm_90`: on this major version from this minor on;
    `compute_90`: on all newer ones."""
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
        return Check("triton", "fail", problem, "torch's CUDA builds for Linux bring it: reinstall torch")
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
