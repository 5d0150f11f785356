"""What processes that are started here inherit: all variables, less those that would break or redirect their start.

What users set for the libraries' sake passes: NCCL_*, GLOO_*, NVSHMEM_*, TORCH_SYMM_MEM_*, TORCH_NCCL_*, TORCH_LOGS,
OMP_*, LD_*, PYTHONHOME, proxies and so on. So do SLURM_*, PMI_*, OMPI_* and other marks of a launcher that nothing here
reads. A pool sets those that name network interfaces itself (pool/processes).
"""

import os
from collections.abc import Mapping
from pathlib import Path

_DENIED = {
    # The host's allocator: cudaMallocAsync breaks sharing memory between processes, and nothing can be captured without
    # torch's own one.
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    # What a launcher around the host has set for env:// rendezvous: a rank, and a place where no rank of ours is.
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NCCL_COMM_ID",
    # gloo's ports are closed when the ranks are connected: they connect at once.
    "TORCH_GLOO_LAZY_INIT",
    # torchrun takes its ranks' interpreter from one, and fails where the other is no level of Python's logging.
    "PYTHON_EXEC",
    "LOGLEVEL",
    # An interpreter that stays after its program has ended, and forgets its exit code.
    "PYTHONINSPECT",
}
_DENIED_PREFIXES = (
    "PET_",  # each option of torchrun that its command line leaves open
    "TORCHELASTIC_",  # what torchrun tells its ranks: of another torchrun, they would use that one's store
    "TORCH_ELASTIC_",  # how its agent counts ranks, and waits for them
    "ROLE_",
    "FASTUSP_",
)


def inherited(environment: Mapping[str, str], *folders: Path) -> dict[str, str]:
    """Returns what of `environment` a process inherits; it imports from `folders` first. Relative folders of PYTHONPATH
    become absolute: it may start in another one."""
    env = {k: v for k, v in environment.items() if k not in _DENIED and not k.startswith(_DENIED_PREFIXES)}
    paths = env.pop("PYTHONPATH", "")
    own = [os.path.abspath(path) for path in paths.split(os.pathsep)] if paths else []
    if folders or own:
        env["PYTHONPATH"] = os.pathsep.join([*map(str, folders), *own])
    return env
