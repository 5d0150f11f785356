"""From a file to a module on a device."""

import torch

from ..config import ModelSpec
from ..errors import CheckpointError
from .checkpoint import TensorInfo, read_header, read_tensors
from .detection import detect
from .family import Transformer


def check_tensors(model: Transformer, header: dict[str, TensorInfo], path: str) -> dict[str, str]:
    """Compares a file's tensors with what the model needs; returns file key -> module key.

    Raises CheckpointError naming what is missing, left over or of another shape.
    """
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    keys = {key: model.module_key(key) for key in header}
    names = set(keys.values())
    problems = [f"tensor {name!r} is missing" for name in sorted(wanted.keys() - names)]
    problems += [f"tensor {key!r} is unknown" for key, name in keys.items() if name not in wanted]
    problems += [
        f"tensor {key!r} is {header[key].shape}, expected {wanted[name]}"
        for key, name in keys.items()
        if name in wanted and header[key].shape != wanted[name]
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{path} is no complete {type(model).__name__} file: {'; '.join(problems[:3])}{more}")
    return keys


def describe_model(spec: ModelSpec) -> tuple[Transformer, dict[str, str]]:
    """The checkpoint's transformer, still without weights, and file key -> module key.

    Raises CheckpointError when the file is unusable or was replaced after the client looked at it.
    """
    now = ModelSpec.of_file(spec.path, storage=spec.storage, compute=spec.compute)
    if now != spec:
        raise CheckpointError(f"{spec.path} was replaced since this workflow loaded it; run the prompt again")
    header = read_header(spec.path)
    with torch.device("meta"):
        model = detect(header, spec.path).build()
    return model, check_tensors(model, header, spec.path)


def load_model(spec: ModelSpec, device: torch.device) -> Transformer:
    """Reads the checkpoint of `spec` onto `device`. Raises as `describe_model`."""
    return read_weights(*describe_model(spec), spec, device)


def read_weights(model: Transformer, keys: dict[str, str], spec: ModelSpec, device: torch.device) -> Transformer:
    """Gives a described model its weights. Raises CheckpointError when the file cannot be read to its end."""
    storage = getattr(torch, spec.storage) if spec.storage else None
    tensors = read_tensors(spec.path, list(keys), device, storage)
    model.load_state_dict({keys[key]: tensor for key, tensor in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)
