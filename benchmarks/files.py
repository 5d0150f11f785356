"""Model files of random weights."""

from pathlib import Path

import torch
from common import random_model
from safetensors.torch import save_file

from fastusp_backend.models.family import FamilyConfig


def write_model(path: Path, config: FamilyConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a file in the family's own keys; see `common` for its weights. It is there whole or not at all."""
    model = random_model(config, device, dtype)
    name = getattr(model, "file_key", str)
    unfinished = path.with_suffix(".part")
    save_file({name(key): tensor.cpu() for key, tensor in model.state_dict().items()}, str(unfinished))
    unfinished.rename(path)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
