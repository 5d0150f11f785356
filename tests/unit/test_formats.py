"""fp8, scaled fp8, packed, all-in-one and GGUF files: kept as they are in memory, computed as their values say."""

from dataclasses import replace

import msgspec
import pytest
import torch
from formats import FORMATS, MINI, write
from safetensors.torch import load_file, save_file
from support import REORDERED, SMALL_SD3, SMALL_Z_IMAGE, OneRank, inputs, load_model, relative_difference, spec_of

from fastusp_backend.config import ModelSpec, Settings
from fastusp_backend.engine.checkpoint import Checkpoint
from fastusp_backend.models.files import read_model
from fastusp_backend.models.layers import Linear
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.prompt import Prompt
from fastusp_backend.weights.dtypes import main_dtype

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
KEPT = {"fp8_": 1, "scal": 1, "nvfp": 0.52, "mxfp": 1, "int8": 1, "int4": 0.52, "mixe": 2, "gguf": 1, "all_": 4}
"""Bytes a value of a block's matrices at most, by the beginning of the format's name."""


def linears(model) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


LAYER = "single_blocks.0.linear1"


def evaluate(model, linear: str = "exact") -> torch.Tensor:
    denoiser = OneRank(model, Settings(linear=linear))
    given = inputs(MINI, text=5, size=(6, 4))
    return denoiser(given.x, given.timestep, Prompt(given.context, given.y, given.guidance)).clone()


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_means_what_its_plain_file_means(mini, tmp_path, name):
    path, plain = tmp_path / name, tmp_path / "plain.safetensors"
    values = write(name, mini, path)
    save_file(values, plain)
    model = load_model(spec_of(path), CPU)
    for layer, linear in linears(model).items():
        expected = values[model.file_key(f"{layer}.weight")]
        assert torch.equal(linear.stored.dequantise(), expected), layer
        weight, bias = linear.rows(slice(3, 9), torch.float32)
        assert torch.equal(weight, expected[3:9])
        assert torch.equal(bias, values[model.file_key(f"{layer}.bias")][3:9])
        if "blocks" in layer:
            assert linear.weight.nbytes <= expected.numel() * KEPT[name[:4]] * 1.1
    reference = load_model(spec_of(plain), CPU)
    for (parameter, held), (_, expected) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.equal(held.float(), expected) or parameter.rpartition(".")[0] in linears(model), parameter
    assert relative_difference(evaluate(model), evaluate(reference)) < REORDERED


NO_MATRICES = {
    "Stable Diffusion 3": (replace(SMALL_SD3, context=256, pooled=256), ("pos_embed", "x_embedder.proj.weight")),
    "Z-Image": (replace(SMALL_Z_IMAGE, context=256), ("x_pad_token", "cap_pad_token", "cap_embedder.norm.weight")),
}


@pytest.mark.parametrize(
    "config, parameters, name",
    [
        pytest.param(*given, name, id=f"{family}-{name}", marks=pytest.mark.thorough if (n + number) % 2 else ())
        for n, (family, given) in enumerate(NO_MATRICES.items())
        for number, name in enumerate(
            ("gguf_Q8_0", "fp8_e4m3fn", "scaled_old_prefixed", "scaled_tensors", "all_in_one")
        )
    ],
)
def test_tensors_that_are_no_matrices(tmp_path, name, config, parameters):
    """Stable Diffusion 3 begins with a convolution and a table of positions, and Z-Image's streams are filled up with
    tokens: all are converted where they are fp8."""
    source, path, plain = (tmp_path / part for part in ("source.safetensors", name, "plain.safetensors"))
    write_checkpoint(str(source), config, seed=4)
    values = write(name, source, path)
    save_file(values, plain)
    models = [load_model(spec_of(file), CPU) for file in (path, plain)]
    assert models[0].config == config
    for parameter in parameters:
        held = models[0].get_parameter(parameter)
        assert held.dtype.itemsize > 1 and torch.equal(held.float(), values[models[0].file_key(parameter)])
    given = inputs(config, text=5, size=(6, 5))
    one, other = (OneRank(model)(given.x, given.timestep, Prompt(given.context, given.y)) for model in models)
    assert relative_difference(one, other) < REORDERED


@pytest.mark.parametrize("name", ["scaled_old", "gguf_Q4_K", "fp8_e5m2", "nvfp4", "int8_rows"])
def test_bfloat16_values_are_rounded_as_comfyui_rounds_them(mini, tmp_path, name):
    values = write(name, mini, tmp_path / name)
    linear = load_model(spec_of(tmp_path / name), CPU).single_blocks[0].linear1
    weight, _ = linear.rows(slice(None), torch.bfloat16)
    if linear.packing or linear.scale is None:
        assert torch.equal(weight, values["single_blocks.0.linear1.weight"].bfloat16())
    else:
        assert torch.equal(weight, linear.weight.to(torch.bfloat16) * linear.scale.to(torch.bfloat16))


@pytest.mark.parametrize("linear", ["exact", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_scale_of_a_weight_that_is_not_fp8_is_multiplied_in(mini, tmp_path, dtype, linear):
    """As some old scaled files have them; and using a weight never changes it."""
    path, plain, weight = tmp_path / "x.safetensors", tmp_path / "plain.safetensors", f"{LAYER}.weight"
    values = write("scaled_old", mini, path)
    state = load_file(path)
    original = load_file(mini)[weight].to(dtype)
    save_file(state | {weight: original, f"{LAYER}.scale_weight": torch.tensor(0.5)}, path)
    save_file(values | {weight: original.float() / 2}, plain)
    model = load_model(msgspec.structs.replace(spec_of(path), linear=linear), CPU)
    first = evaluate(model, linear)
    assert torch.equal(evaluate(model, linear), first)
    if linear == "exact":
        reference, values = load_model(spec_of(plain), CPU), linears(model)
        for layer, linear in linears(reference).items():
            assert torch.equal(values[layer].stored.dequantise(), linear.stored.dequantise()), layer
        assert relative_difference(first, evaluate(reference)) < REORDERED
        assert model.get_submodule(LAYER).weight.dtype == dtype


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "scaled_metadata", "gguf_Q8_0", "nvfp4"])
@pytest.mark.parametrize("keep", [True, False])
def test_storage_of_what_is_quantised(mini, tmp_path, name, keep):
    """keep_quantised: GPUs' default, where the other tensors take the type of computation."""
    values = write(name, mini, tmp_path / name)
    spec = ModelSpec.of_file(str(tmp_path / name), storage="bfloat16", compute="bfloat16", keep_quantised=keep)
    model = load_model(spec, CPU)
    block = model.single_blocks[0]
    assert (block.linear1.weight.dtype == torch.bfloat16) != keep
    assert block.norm.key_norm.scale.dtype == block.linear1.bias.dtype == torch.bfloat16
    if not keep and name != "scaled_metadata":
        assert torch.equal(block.linear1.weight, values["single_blocks.0.linear1.weight"].bfloat16())
    if name == "gguf_Q8_0":
        assert model.img_in.weight.dtype == torch.bfloat16
    assert (block.linear1.packing == "Q8_0") == (keep and name == "gguf_Q8_0")


@pytest.mark.parametrize("storage", ["float8_e4m3fn", "float8_e5m2"])
def test_a_plain_file_stored_in_fp8(mini, tmp_path, storage):
    model = load_model(ModelSpec.of_file(str(mini), storage=storage, compute="float32"), CPU)
    dtype, tensors = getattr(torch, storage), load_file(mini)
    for name, parameter in model.named_parameters():
        expected = tensors[model.file_key(name)].to(dtype)
        assert torch.equal(parameter.float(), expected.float())
        assert parameter.dtype == (dtype if expected.dim() == 2 else torch.bfloat16)


@pytest.mark.parametrize("name", ["scaled_tensors", "gguf_Q4_K", "all_in_one", "mxfp8", "int8_rows"])
def test_what_was_changed_is_read_again(mini, tmp_path, name):
    write(name, mini, tmp_path / name)
    checkpoint = Checkpoint(spec_of(tmp_path / name))
    checkpoint.allocate(CPU)
    linear = checkpoint.read().single_blocks[0].linear1
    before, scale = linear.weight.clone(), linear.scale
    linear.weight.view(torch.uint8).fill_(1)
    ((_, again),) = checkpoint.reread(["single_blocks.0.linear1.weight"])
    assert torch.equal(again.data.view(torch.uint8), before.view(torch.uint8))
    assert again.scale is scale is None or torch.equal(again.scale, scale)
    assert again.packing == linear.packing


def test_the_main_type(mini, tmp_path):
    for name, dtype in (("fp8_e5m2", torch.float8_e5m2), ("gguf_Q8_0", torch.float32), ("all_in_one", torch.float32)):
        write(name, mini, tmp_path / name)
        assert main_dtype(read_model(str(tmp_path / name)).header) == dtype


def test_tensors_may_begin_anywhere(tmp_path, mini):
    """Old writers did not align the header."""
    state, path = load_file(mini), tmp_path / "odd.safetensors"
    data = mini.read_bytes()
    size = int.from_bytes(data[:8], "little")
    path.write_bytes((size + 1).to_bytes(8, "little") + data[8 : 8 + size] + b" " + data[8 + size :])
    model = load_model(spec_of(path), CPU)
    assert all(torch.equal(p, state[model.file_key(name)]) for name, p in model.named_parameters())
