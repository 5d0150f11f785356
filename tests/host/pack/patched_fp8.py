"""LoRAs in fp8 weights, by ComfyUI's own patcher and by the workers' code.

ComfyUI keeps the weights in fp8 here, as on a GPU, and rounds what it has patched at random, up or down; ours rounds to
the nearest, so the two may be one unit of the stored type apart (of their two units the larger).
"""

import importlib
import os
from typing import NamedTuple

import comfy.model_management
import comfy.sd
import comfy.utils
import torch

import nodes

LIMITS = {dtype: torch.finfo(dtype).max for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}


class PatchedFP8:
    """Fails where they are further apart, or where the comparison would show nothing. file, loras: paths."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": ("STRING", {}), "loras": ("STRING", {"multiline": True})}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "compare"
    CATEGORY = "test"

    def compare(self, file, loras):
        compare(file, loras.splitlines())
        return {}


class Held(NamedTuple):
    """A weight, and what its values are to be multiplied by."""

    data: torch.Tensor
    scale: torch.Tensor | None

    def dequantise(self) -> torch.Tensor:
        return self.data.float() if self.scale is None else self.data.float() * self.scale


def part(name: str):
    """A module of FastUSP, under the name by which this ComfyUI has loaded it."""
    package = nodes.NODE_CLASS_MAPPINGS["FastUSPLoader"].__module__.removesuffix(".nodes.loader")
    return importlib.import_module(f"{package}.{name}")


def weight_of(model, key: str) -> Held:
    """A weight of ComfyUI's model: its values in fp8 and their scale, if that is how it is held."""
    layer, _, leaf = key.rpartition(".")
    layer = comfy.utils.get_attr(model, layer)
    weight = getattr(layer, leaf)
    if hasattr(weight, "_qdata"):  # 0.33.0: a tensor class with values and scale
        return Held(weight._qdata.data, weight._params.scale.float())
    scale = getattr(layer, "scale_weight", None)  # 0.3.64: beside it
    return Held(weight.data, None if scale is None or leaf != "weight" else scale.float().reshape(()))


def units(stored: Held) -> torch.Tensor:
    """The distance of each value from the next larger one of its type, scale included."""
    info, data = torch.finfo(stored.data.dtype), stored.data.float().abs()
    size = info.eps * torch.exp2(data.clamp(min=info.smallest_normal).log2().floor())
    return size if stored.scale is None else size * stored.scale


def patched(path: str, loras: list[str]) -> tuple[object, dict, dict[str, tuple[int, ...]]]:
    """ComfyUI's patcher, when it has loaded the model with its LoRAs; the weights before that, and their shapes."""
    kept = {dtype for dtype in LIMITS if str(dtype).removeprefix("torch.float8_") in os.path.basename(path)}
    model = comfy.sd.load_diffusion_model(path, model_options={"dtype": kept.pop()} if kept else {})
    for file in loras:
        model = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(file), 0.8, 0)[0]
    shapes = {key: tuple(weight.shape) for key, weight in model.model.state_dict().items() if key in model.patches}
    plain = {key: weight_of(model.model, key).data.clone() for key in model.patches}
    comfy.model_management.load_models_gpu([model])
    return model, plain, shapes


def compare(path: str, loras: list[str]) -> None:
    adapted = part("nodes.weight_patches")
    names = "config", "engine.checkpoint", "engine.patching"
    config, checkpoints, patching = (part(f"fastusp_backend.{name}") for name in names)
    model, plain, shapes = patched(path, loras)
    checkpoint = checkpoints.Checkpoint(config.ModelSpec.of_file(path, storage=None, compute="float32"))
    checkpoint.allocate(torch.device("cpu"))
    checkpoint.read()
    wanted, _ = adapted.weight_patches(model.patches, shapes)
    names = {key: checkpoint.model.module_key(key) for key in wanted.weights}
    before = {key: checkpoint.stored(name).dequantise() for key, name in names.items()}
    patching.PatchedWeights(checkpoint).change(wanted.weights, wanted.tensors, base=0, number=1)
    quantised, in_fp8, values, otherwise = 0, 0, 0, 0
    for key, name in names.items():
        ours = checkpoint.stored(name)
        in_fp8 += ours.data.dtype in LIMITS
        theirs = weight_of(model.model, adapted.PREFIX + key)
        assert not torch.equal(plain[adapted.PREFIX + key], theirs.data), f"{path}: ComfyUI does not patch {key}"
        got, want, limit, allowed = ours.dequantise(), theirs.dequantise(), torch.inf, 1.0
        if theirs.scale is not None:
            limit = LIMITS[theirs.data.dtype] * theirs.scale
            if not torch.allclose(ours.scale, theirs.scale, rtol=1e-5):
                # 0.3.64 keeps the scale. Ours is within half of its own unit then, ComfyUI's within one, but two just
                # below a power of two, which the logarithm in half that it takes does not tell from the power.
                allowed = 2.5
        unit = torch.maximum(units(ours), units(theirs))
        apart = ((got - want).abs() / unit)[got.abs() <= 1.00001 * limit].max().item()
        assert apart <= allowed + 1e-4, f"{path}: {key} is {apart} units from ComfyUI's"
        if ours.data.dtype in LIMITS and theirs.data.dtype in LIMITS:
            moved = ((got - before[key]).abs() / unit).max().item() if key != "img_in.weight" else torch.inf  # widened
            assert moved > 4, f"{path}: {key} moves by {moved} units, which shows nothing"
            quantised += 1
            values += got.numel()
            otherwise += (got != want).sum().item()
    assert quantised > in_fp8 / 2 > 0, f"{path}: ComfyUI holds {quantised} weights in fp8, the workers {in_fp8}"
    assert otherwise > 0.1 * values, f"{path}: ComfyUI does not round at random"
