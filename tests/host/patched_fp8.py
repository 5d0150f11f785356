"""Run by the host's own Python: LoRAs in fp8 weights, by ComfyUI's own patcher and by the workers' code.

Arguments: the host's folder, this repository, LoRA files with their strengths (`file=0.8`, joined by commas), then fp8
FLUX files. ComfyUI keeps their weights in fp8 here as on a GPU, and rounds what it has patched at random, up or down;
ours rounds to the nearest, so the two may be one unit of the stored type apart (of their two units the larger).
Prints a line for each file, then `done`.
"""

import importlib.util
import os
import sys

import torch

HOST, REPOSITORY, LORAS, *FILES = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
sys.path[0] = HOST  # in place of this folder, whose comfy.py is another

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import utils.extra_config  # noqa: E402, F401 - before a dependency brings a `utils` of its own

spec = importlib.util.spec_from_file_location(
    "fastusp_pack", f"{REPOSITORY}/__init__.py", submodule_search_locations=[REPOSITORY]
)
pack = sys.modules["fastusp_pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
from fastusp_pack.fastusp_backend.config import ModelSpec  # noqa: E402
from fastusp_pack.fastusp_backend.engine.loading import Checkpoint  # noqa: E402
from fastusp_pack.fastusp_backend.engine.patching import PatchedWeights  # noqa: E402
from fastusp_pack.fastusp_backend.weights.headers import FP8  # noqa: E402
from fastusp_pack.fastusp_backend.weights.stored import Stored  # noqa: E402
from fastusp_pack.nodes.weight_patches import PREFIX, weight_patches  # noqa: E402

CPU = torch.device("cpu")
torch.set_grad_enabled(False)


def weight_of(model, key: str) -> Stored:
    """A weight of ComfyUI's model: its values in fp8 and their scale, if that is how it is held."""
    layer, _, leaf = key.rpartition(".")
    layer = comfy.utils.get_attr(model, layer)
    weight = getattr(layer, leaf)
    if hasattr(weight, "_qdata"):  # 0.33.0: a tensor class with values and scale
        return Stored(weight._qdata.data, weight._params.scale.float())
    scale = getattr(layer, "scale_weight", None)  # 0.3.64: beside it
    return Stored(weight.data, None if scale is None or leaf != "weight" else scale.float().reshape(()))


def units(stored: Stored) -> torch.Tensor:
    """The distance of each value from the next larger one of its type, scale included."""
    info, data = torch.finfo(stored.data.dtype), stored.data.float().abs()
    size = info.eps * torch.exp2(data.clamp(min=info.smallest_normal).log2().floor())
    return size if stored.scale is None else size * stored.scale


def patched(path: str) -> tuple[object, dict, dict[str, tuple[int, ...]]]:
    """ComfyUI's patcher, after it has loaded the model with the LoRAs, the patches, and the weights' shapes."""
    kept = {dtype for dtype in FP8 if str(dtype).removeprefix("torch.float8_") in os.path.basename(path)}
    model = comfy.sd.load_diffusion_model(path, model_options={"dtype": kept.pop()} if kept else {})
    for entry in LORAS.split(","):
        file, strength = entry.split("=")
        lora = comfy.utils.load_torch_file(file)
        model = comfy.sd.load_lora_for_models(model, None, lora, float(strength), 0)[0]
    shapes = {key: tuple(weight.shape) for key, weight in model.model.state_dict().items() if key in model.patches}
    plain = {key: weight_of(model.model, key).data.clone() for key in model.patches}
    comfy.model_management.load_models_gpu([model])
    return model, plain, shapes


def compare(path: str) -> None:
    model, plain, shapes = patched(path)
    checkpoint = Checkpoint(ModelSpec.of_file(path, storage=None, compute="float32"))
    checkpoint.allocate(CPU)
    checkpoint.read()
    wanted = weight_patches(model.patches, shapes)
    held = {key: checkpoint.held(checkpoint.model.module_key(key)) for key in wanted.weights}
    before = {key: stored.dequantise() for key, stored in held.items()}
    PatchedWeights(checkpoint).change(wanted.weights, wanted.tensors, base=0, number=1)
    quantised, values, otherwise, scales = 0, 0, 0, 0.0
    for key, ours in held.items():
        theirs = weight_of(model.model, PREFIX + key)
        assert not torch.equal(plain[PREFIX + key], theirs.data), f"{path}: ComfyUI does not patch {key}"
        got, want, limit, allowed = ours.dequantise(), theirs.dequantise(), torch.inf, 1.0
        if theirs.scale is not None:
            scales = max(scales, (ours.scale / theirs.scale - 1).abs().item())
            limit = torch.finfo(theirs.data.dtype).max * theirs.scale
            if not torch.allclose(ours.scale, theirs.scale, rtol=1e-5):
                # 0.3.64 keeps the scale. Ours is within half of its own unit then, ComfyUI's within one, but two just
                # below a power of two, which the logarithm in half that it takes does not tell from the power.
                allowed = 2.5
        unit = torch.maximum(units(ours), units(theirs))
        apart = ((got - want).abs() / unit)[got.abs() <= 1.00001 * limit].max().item()
        assert apart <= allowed + 1e-4, f"{path}: {key} is {apart} units from ComfyUI's"
        if ours.data.dtype in FP8 and theirs.data.dtype in FP8:
            moved = ((got - before[key]).abs() / unit).max().item()
            assert moved > 4, f"{path}: {key} moves by {moved} units, which shows nothing"
            quantised += 1
            values += got.numel()
            otherwise += (got != want).sum().item()
    assert quantised > len(held) / 2, f"{path}: ComfyUI holds {quantised} of {len(held)} weights in fp8"
    assert otherwise > 0.1 * values, f"{path}: ComfyUI does not round at random"
    name = os.path.basename(path)
    print(f"{name}: {quantised} fp8 weights, {otherwise / values:.0%} rounded otherwise, scales {scales:.0e} apart")


for file in FILES:
    compare(file)
print("done")
