"""Chroma files of any size are recognised and read; what does not fit is named."""

from dataclasses import replace
from math import prod

import pytest
import torch
from formats import write
from safetensors.torch import load_file, save_file
from support import (
    REORDERED,
    SMALL_CHROMA,
    OneRank,
    inputs,
    load_model,
    refusal_of_changed,
    relative_difference,
    spec_of,
)

from fastusp_backend.errors import CheckpointError
from fastusp_backend.models.detection import detect, family_of
from fastusp_backend.models.layers import Linear
from fastusp_backend.models.synthetic import CHROMA, FLUX_DEV, write_checkpoint
from fastusp_backend.prompt import Prompt
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
MINI = replace(SMALL_CHROMA, hidden=128, heads=1, mlp=128, double_blocks=1, single_blocks=1)
APPROXIMATOR = "distilled_guidance_layer"


@pytest.mark.parametrize(
    "config",
    [
        MINI,
        replace(MINI, hidden=256, heads=2, mlp=768, double_blocks=3, single_blocks=5, approximator=96),
        replace(MINI, double_blocks=19, single_blocks=38),
        replace(MINI, channels=4, context=96),
    ],
    ids=["mini", "wide", "deep", "other inputs"],
)
@pytest.mark.parametrize("spelling", ["scale", "weight"])
def test_sizes(tmp_path, config, spelling):
    """Scales of norms have two names."""
    path = tmp_path / "chroma.safetensors"
    write_checkpoint(str(path), config)
    tensors = {
        f"{name.removesuffix('scale')}{spelling}" if name.endswith(".scale") else name: t
        for name, t in load_file(path).items()
    }
    assert any(name.startswith(APPROXIMATOR) and name.endswith(f"norms.4.{spelling}") for name in tensors)
    save_file(tensors, path)
    model = load_model(spec_of(path), CPU)
    assert model.config == config
    assert model.state_dict().keys() == {model.module_key(name) for name in tensors}
    assert all(torch.equal(model.get_parameter(model.module_key(name)), t) for name, t in tensors.items())


def full_header(config) -> dict[str, TensorInfo]:
    with torch.device("meta"):
        model = config.build()
    return {model.file_key(name): TensorInfo(tuple(p.shape), torch.bfloat16) for name, p in model.named_parameters()}


def test_a_full_sized_header():
    """The model's own sizes and names, without its file."""
    header = full_header(CHROMA)
    assert detect(header, "file") == CHROMA and CHROMA.vectors == 344
    assert sum(prod(info.shape) for info in header.values()) / 1e9 == pytest.approx(8.9, abs=0.01)
    for name, shape in (
        (f"{APPROXIMATOR}.in_proj.weight", (5120, 64)),
        (f"{APPROXIMATOR}.layers.4.out_layer.weight", (5120, 5120)),
        (f"{APPROXIMATOR}.norms.4.scale", (5120,)),
        (f"{APPROXIMATOR}.out_proj.bias", (3072,)),
        ("double_blocks.18.txt_attn.norm.key_norm.scale", (128,)),
        ("single_blocks.37.linear1.weight", (21504, 3072)),
        ("final_layer.linear.weight", (64, 3072)),
    ):
        assert header[name].shape == shape
    assert not any("mod" in name or name.startswith(("time_in", "vector_in", "guidance_in")) for name in header)


def test_flux_and_chroma_are_told_apart_by_what_they_need():
    """Neither lacks much of the other."""
    flux, chroma = full_header(FLUX_DEV), full_header(CHROMA)
    assert family_of(flux, "file").family == "FLUX.1" and family_of(chroma, "file").family == "Chroma"
    for whole, family in ((flux, "FLUX.1"), (chroma, "Chroma")):
        left = {name: info for name, info in whole.items() if name != "single_blocks.7.linear1.weight"}
        with pytest.raises(CheckpointError, match=f"an incomplete {family} file, without 1 of its .*7.linear1.weight"):
            family_of(left, "file")


@pytest.mark.parametrize(
    "name, shape, words",
    [
        (f"{APPROXIMATOR}.norms.2.scale", None, "1 of its 61 tensors: 'distilled_guidance_layer.norms.2.scale'"),
        (f"{APPROXIMATOR}.in_proj.weight", None, "incomplete Chroma file"),
        ("double_blocks.0.txt_mlp.2.bias", None, "'double_blocks.0.txt_mlp.2.bias'"),
        ("img_in.weight", (128, 128), "takes 128 values per patch and gives 64: it is not one of Chroma1-HD"),
        ("final_layer.linear.weight", (62, 128), "takes 64 values per patch and gives 62"),
        (f"{APPROXIMATOR}.in_proj.weight", (64, 48), "is (64, 48), expected (64, 64)"),
        (f"{APPROXIMATOR}.out_proj.weight", (256, 64), "is (256, 64), expected (128, 64)"),
        (f"{APPROXIMATOR}.layers.3.in_layer.weight", (32, 64), "is (32, 64), expected (64, 64)"),
    ],
    ids=str,
)
def test_unfit_files(tmp_path, name, shape, words):
    path = tmp_path / "chroma.safetensors"
    write_checkpoint(str(path), MINI)
    assert words in refusal_of_changed(path, name, shape)


def test_more_blocks_than_there_are_modulations_for():
    header = full_header(replace(MINI, double_blocks=20, single_blocks=38))
    with pytest.raises(CheckpointError, match="has 20 double and 38 single blocks, which take 356 vectors"):
        detect(header, "file")


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "scaled_old_prefixed", "scaled_tensors", "all_in_one", "gguf_Q8_0"])
def test_formats(tmp_path, name):
    """The approximator has a norm's scale in each, and in those of GGUF also in float32."""
    source, path, plain = (tmp_path / part for part in ("source.safetensors", name, "plain.safetensors"))
    config = replace(MINI, hidden=256, heads=2, mlp=256, context=256, approximator=256)
    write_checkpoint(str(source), config, seed=4)
    values = write(name, source, path)
    save_file(values, plain)
    models = [load_model(spec_of(file), CPU) for file in (path, plain)]
    assert models[0].config == config
    for layer, module in models[0].named_modules():
        if isinstance(module, Linear):
            assert torch.equal(module.stored.dequantise(), values[models[0].file_key(f"{layer}.weight")]), layer
    given = inputs(config, text=5, size=(6, 5))
    one, other = (OneRank(model)(given.x, given.timestep, Prompt(given.context)) for model in models)
    assert relative_difference(one, other) < REORDERED


def test_a_whole_flux_beside_an_approximator():
    """ComfyUI takes what has an approximator's norms for Chroma: it is never FLUX.1 in silence."""
    both = full_header(FLUX_DEV) | full_header(CHROMA)
    assert family_of(both, "x").family == CHROMA.family
    for some in ("norms.0.scale", "norms.0.weight", "0.norms.0.scale"):
        header = full_header(FLUX_DEV) | {f"{APPROXIMATOR}.{some}": TensorInfo((64,), torch.bfloat16)}
        with pytest.raises(CheckpointError, match="a part of Chroma beside FLUX.1"):
            family_of(header, "x")


@pytest.mark.parametrize("spelling", ["scale", "weight"])
def test_an_approximator_under_another_name_is_told(spelling):
    """ComfyUI takes such a file for Chroma, too, and loads none of these tensors."""
    header = {
        name.replace(f"{APPROXIMATOR}.", f"{APPROXIMATOR}.0.").replace(".scale", f".{spelling}"): info
        for name, info in full_header(CHROMA).items()
    }
    with pytest.raises(CheckpointError, match=r"tensors distilled_guidance_layer\.0\.\* should be disti"):
        family_of(header, "x")
