"""Model files of random weights, stored as people have them."""

from pathlib import Path

import gguf
import torch
from common import random_model
from safetensors.torch import save_file
from storages import STORAGES

from fastusp_backend.models.family import FamilyConfig

FORMATS = ("bfloat16", *STORAGES)


def write_model(path: Path, config: FamilyConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a file in the family's own keys; see `common` for its weights. It is there whole or not at all."""
    save_file(_tensors(config, device, dtype), str(path.with_suffix(".part")))
    path.with_suffix(".part").rename(path)


def write_as(path: Path, config: FamilyConfig, device: torch.device, stored: str) -> None:
    """Writes the same weights in bf16, or those of the blocks' products in a format of `STORAGES`, a `.gguf` file."""
    if stored == "bfloat16":
        write_model(path, config, device)
        return
    tensors = _tensors(config, device, torch.bfloat16)
    small = {
        key: STORAGES[stored](tensor.to(device)).data.cpu()
        for key, tensor in tensors.items()
        if tensor.dim() == 2 and "blocks" in key
    }
    unfinished = path.with_suffix(".part")
    if stored == "fp8":
        save_file(tensors | small, str(unfinished))
    else:
        _save_gguf(tensors, small, stored, unfinished)
    unfinished.rename(path)


def _save_gguf(tensors: dict[str, torch.Tensor], small: dict[str, torch.Tensor], stored: str, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "flux")
    for key, tensor in tensors.items():
        if key in small:
            writer.add_tensor(key, small[key].numpy(), raw_dtype=gguf.GGMLQuantizationType[stored])
        elif tensor.dim() == 1:
            writer.add_tensor(key, tensor.float().numpy())
        else:
            writer.add_tensor(key, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(config: FamilyConfig, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = random_model(config, device, dtype)
    name = getattr(model, "file_key", str)
    tensors = {name(key): tensor.cpu() for key, tensor in model.state_dict().items()}
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return tensors
