"""`python -m fastusp_backend.cli.doctor.probe` prints what torch and CUDA say of the visible GPUs, as `facts.Probe`."""

import importlib
import json
import os

from .facts import PACKAGES


def main() -> None:
    print(json.dumps(_probe()))


def _probe() -> dict:
    missing = {name: problem for name in PACKAGES if (problem := _import_problem(name))}
    try:
        import torch
    except Exception as error:  # whatever a broken installation raises
        return {"missing": missing, "error": f"torch cannot be imported: {type(error).__name__}: {error}"}
    found = {"missing": missing, "torch": str(torch.__version__), "cuda": torch.version.cuda} | _triton()
    if torch.version.cuda is None or not os.environ.get("CUDA_VISIBLE_DEVICES"):
        return found
    try:
        torch.cuda.init()  # says why it fails, as is_available does not
        count = torch.cuda.device_count()
        peers = [[i != j and torch.cuda.can_device_access_peer(i, j) for j in range(count)] for i in range(count)]
        return found | {
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "architectures": torch.cuda.get_arch_list(),
            "names": [torch.cuda.get_device_name(i) for i in range(count)],
            "peers": peers,
            "symmetric": [_symmetric(torch.device("cuda", i)) for i in range(count)],
        }
    except Exception as error:
        return found | {"error": f"CUDA does not work: {type(error).__name__}: {error}"}


def _import_problem(name: str) -> str:
    try:
        importlib.import_module({"nvidia-ml-py": "pynvml", "pillow": "PIL"}.get(name, name))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _triton() -> dict:
    try:
        return {"triton": importlib.import_module("triton").__version__}
    except Exception as error:
        return {"triton_problem": f"{type(error).__name__}: {error}"}


def _symmetric(device) -> str:
    """Says why symmetric memory cannot be allocated on a device; empty where it can."""
    import torch

    try:
        symmetric_memory = importlib.import_module("torch.distributed._symmetric_memory")
        symmetric_memory.empty(1 << 20, dtype=torch.uint8, device=device)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


if __name__ == "__main__":
    main()
