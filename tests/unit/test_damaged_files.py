"""Files that lost or gained a little: refused by what is wrong with them, never read as another model."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from formats import write
from safetensors.torch import load_file, save_file
from support import SMALL_QWEN

from fastusp_backend.errors import CheckpointError
from fastusp_backend.models.files import read_model
from fastusp_backend.models.synthetic import TINY_FLUX, write_checkpoint

pytestmark = pytest.mark.unit

LAYER = "single_blocks.0.linear1"
NARROW = replace(TINY_FLUX, double_blocks=3, single_blocks=9, hidden=128, heads=1, mlp=256)


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as refused:
        read_model(str(path))
    return str(refused.value)


@pytest.fixture
def flux(tmp_path):
    """A path, and the tensors of a whole file."""
    path = tmp_path / "flux.safetensors"
    write_checkpoint(str(path), NARROW)
    return path, load_file(path)


@pytest.mark.parametrize(
    "name, leaf, missing",
    [
        ("scaled_old", "scale_weight", "scale_weight"),
        ("scaled_tensors", ("weight_scale", "comfy_quant"), "weight_scale"),
    ],
)
def test_a_lost_scale_is_not_one(mini, tmp_path, name, leaf, missing):
    """An fp8 weight without its scale is a thousand times too large."""
    path = tmp_path / "x.safetensors"
    write(name, mini, path)
    state = load_file(path)
    save_file({k: t for k, t in state.items() if not (k.startswith(LAYER) and k.endswith(leaf))}, path)
    assert f"incomplete scaled fp8 file, without tensor '{LAYER}.{missing}'" in refusal(path)
    save_file({k: t for k, t in state.items() if not k.endswith(leaf)}, path)
    assert "incomplete scaled fp8 file, without tensor" in refusal(path)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_scale_that_cannot_be_one(mini, tmp_path, value):
    path = tmp_path / "x.safetensors"
    write("scaled_old", mini, path)
    save_file(load_file(path) | {f"{LAYER}.scale_weight": torch.tensor(value)}, path)
    assert f"its scale '{LAYER}.scale_weight' is {value}" in refusal(path)


def test_the_metadata_goes_before_a_tensor(mini, tmp_path):
    """As in ComfyUI."""
    path = tmp_path / "x.safetensors"
    write("scaled_tensors", mini, path)
    said = json.dumps({"layers": {LAYER: {"format": "mxfp4"}}})
    save_file(load_file(path), path, metadata={"_quantization_metadata": said})
    assert "quantised as mxfp4" in refusal(path)


@pytest.mark.parametrize("said", ["[" * 3000 + "]" * 3000, json.dumps({"layers": {LAYER: {"format": ["x"]}}})])
def test_metadata_that_is_no_metadata(mini, tmp_path, said):
    path = tmp_path / "x.safetensors"
    save_file(load_file(mini), path, metadata={"_quantization_metadata": said})
    assert "malformed" in refusal(path) or "quantised as ['x']" in refusal(path)


@pytest.mark.parametrize("kept", [2, 5])
def test_a_cut_last_block_is_no_shorter_model(flux, kept):
    path, state = flux
    last = [name for name in state if name.startswith("single_blocks.8.")]
    save_file({k: t for k, t in state.items() if k not in last[kept:]}, path)
    assert f"incomplete FLUX.1 file, without {len(last) - kept} of its {len(state)} tensors" in refusal(path)


@pytest.mark.parametrize("blocks", ["single_blocks.", "double_blocks."])
def test_a_model_without_blocks_of_a_kind_is_none(flux, blocks):
    path, state = flux
    save_file({k: t for k, t in state.items() if not k.startswith(blocks)}, path)
    text = refusal(path)
    assert f"'{blocks}0." in text or "is not a FLUX.2 or" in text, text


def test_a_middle_block_that_is_gone(flux):
    path, state = flux
    save_file({k: t for k, t in state.items() if not k.startswith("double_blocks.1.")}, path)
    assert "incomplete FLUX.1 file" in refusal(path)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "net."])
def test_a_prefixed_file_without_a_tensor_that_marks_its_family(flux, prefix):
    path, state = flux
    others = {f"first_stage_model.decoder.{n}.weight": torch.ones(2) for n in range(9)}
    save_file({prefix + k: t for k, t in state.items() if k != "img_in.weight"} | others, path)
    assert f"incomplete FLUX.1 file, without 1 of its {len(state)} tensors: 'img_in.weight'" in refusal(path)


@pytest.mark.parametrize("stray", ["distilled_guidance_layer.foo", "txt_norm.foo", "double_stream_modulation_img.foo"])
def test_names_that_only_begin_like_a_variants(flux, stray):
    path, state = flux
    save_file(state | {stray: torch.ones(2)}, path)
    file = read_model(str(path))
    assert file.config.family == "FLUX.1" and file.ignored == (stray,)


def test_qwen_image_beside_something_of_flux(tmp_path):
    path = tmp_path / "qwen.safetensors"
    write_checkpoint(str(path), replace(SMALL_QWEN, hidden=128, heads=1, mlp=256, blocks=1))
    save_file(load_file(path) | {"double_blocks.0.img_attn.norm.foo": torch.ones(2)}, path)
    assert read_model(str(path)).config.family == "Qwen-Image"


def test_one_tensor_in_two_spellings(flux):
    path, state = flux
    name = "double_blocks.0.img_attn.norm.query_norm."
    save_file(state | {name + "weight": state[name + "scale"].clone()}, path)
    assert "has two tensors for" in refusal(path) and "query_norm" in refusal(path)


def test_more_blocks_than_anybody_has(flux, caplog):
    path, state = flux
    with caplog.at_level(logging.INFO):
        save_file(state | {f"double_blocks.{n}.img_mlp.0.bias": torch.ones(1) for n in range(5000)}, path)
        assert refusal(path).startswith(
            f"Use another file than {path}: it has 5000 double_blocks, no model has more than"
        )
