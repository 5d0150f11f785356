"""Whether the GPUs are fit for work, and how they reach each other."""

from ....devices import Gpu
from ..check import Check
from ..facts import Facts

BFLOAT16, FP8 = (8, 0), (8, 9)
"""Compute capabilities from which GPUs compute in these types."""


def visible(facts: Facts) -> list[Check]:
    """Tells what CUDA_VISIBLE_DEVICES does to gpus = auto and all."""
    if not facts.visible:
        return []
    if facts.visible_problem or not facts.gpus:
        advice = "Fix it, unset it, or name GPUs by nvidia-smi's index: --gpus 0,1"
        return [Check("visible GPUs", "warn", facts.visible, advice)]
    return [Check("visible GPUs", "ok", facts.visible)]


def devices(facts: Facts) -> list[Check]:
    if not facts.gpus and facts.wanted == "auto" and not facts.visible:
        advice = (
            "If this machine has GPUs: install NVIDIA's driver with its libnvidia-ml.so.1 (in a container: set\n"
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility); else use --gpus cpu:N"
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


def _state(facts: Facts, gpu: Gpu) -> Check:
    name = f"GPU {gpu.index}"
    state = next((x for x in facts.states if x.index == gpu.index), None)
    if state is None:
        return Check(name, "fail", "NVML does not tell its state", "Look at nvidia-smi; reinstall the driver")
    major, minor = gpu.compute_capability
    types = ["bfloat16"] * ((major, minor) >= BFLOAT16) + ["fp8 products"] * ((major, minor) >= FP8)
    told = state.free is not None and state.total is not None
    memory = f"{state.free / 1e9:.1f} of {state.total / 1e9:.1f} GB free" if told else "NVML reports no memory size"
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
        return Check(name, "warn", text, "Other programs use more than half of it: nvidia-smi lists them")
    if (major, minor) < BFLOAT16:
        return Check(
            name, "warn", text, "Models that do not compute in float16 compute in float32 here: slow, and large"
        )
    return Check(name, "ok", text)


def links(facts: Facts) -> list[Check]:
    """Tells how each pair of GPUs is joined."""
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
