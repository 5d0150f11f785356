"""Whether the machine around the GPUs will do: memory, limits, folders, variables."""

from ..check import Check
from ..facts import Facts

SHARED_MEMORY = 256 << 20
"""What NCCL asks of /dev/shm stays below, for 8 GPUs; Docker gives 64 MiB."""
HOST_MEMORY = 4 << 30
DESCRIPTORS = 1024

_ADVICE = {
    "NCCL_P2P_DISABLE": "Exchanges go through host memory, which is slower than direct peer access",
    "NCCL_SHM_DISABLE": "NCCL then uses the network inside this machine: unset it",
}


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
        advice = "The pool's socket and logs go there: set TMPDIR to a folder of your own on a Linux file system"
        return Check("temporary folder", "fail", f"{facts.temporary}: {facts.run_dir_problem}", advice)
    return Check("temporary folder", "ok", f"{facts.temporary}: takes a private folder with a socket")


def environment(facts: Facts) -> list[Check]:
    env = facts.environment
    text = ", ".join(f"{name}={value}" for name, value in env.items()) or "nothing that matters is set"
    if facts.dropped:
        text += f"; not handed to the workers as it is: {', '.join(facts.dropped)}"
    slow = [name for name in _ADVICE if env.get(name, "0") != "0"]
    if slow and len(facts.gpus) > 1:
        return [Check("environment", "warn", text, "\n".join(f"{name}: {_ADVICE[name]}" for name in slow))]
    return [Check("environment", "ok", text)]
