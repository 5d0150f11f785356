"""Stable Diffusion 3 files of any size are recognised and read; what does not fit is named."""

from dataclasses import replace
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import SMALL_SD3, load_model, refusal_of_changed, spec_of

from fastusp_backend.errors import CheckpointError
from fastusp_backend.models.detection import detect
from fastusp_backend.models.synthetic import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, write_checkpoint
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
MINI = replace(SMALL_SD3, hidden=64, heads=1, mlp=256, second_attentions=1, positions=4)


@pytest.mark.parametrize(
    "config",
    [
        MINI,
        replace(MINI, second_attentions=0),
        replace(MINI, second_attentions=0, normed=False),
        replace(MINI, second_attentions=3, blocks=3),
        replace(MINI, second_attentions=1, blocks=1),
        replace(MINI, hidden=192, heads=3, mlp=768, blocks=11, second_attentions=7, positions=9),
        replace(MINI, channels=4, context=96, pooled=48),
    ],
    ids=["3.5 medium", "3.5 large", "3", "all with two", "one block", "wide and deep", "other inputs"],
)
def test_sizes(tmp_path, config):
    path = tmp_path / "sd3.safetensors"
    write_checkpoint(str(path), config)
    model = load_model(spec_of(path), CPU)
    assert model.config == config
    tensors = load_file(path)
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "config, billions, last",
    [
        (SD35_LARGE, 8.146, "joint_blocks.37"),
        (SD35_MEDIUM, 2.470, "joint_blocks.23"),
        (SD3_MEDIUM, 2.085, "joint_blocks.23"),
    ],
    ids=["3.5 large", "3.5 medium", "3 medium"],
)
def test_full_sized_headers(config, billions, last):
    """The models' own sizes and names, without their files."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in config.build().named_parameters()}
    header = {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()}
    assert detect(header, "file") == config
    assert sum(map(prod, shapes.values())) / 1e9 == pytest.approx(billions, abs=0.001)
    width = config.hidden
    assert shapes["x_embedder.proj.weight"] == (width, 16, 2, 2)
    assert shapes["pos_embed"] == (1, config.positions**2, width)
    assert shapes[f"{last}.context_block.adaLN_modulation.1.weight"] == (2 * width, width)
    assert f"{last}.context_block.attn.qkv.weight" in shapes and f"{last}.context_block.attn.proj.weight" not in shapes
    parts = 9 if config.second_attentions else 6
    assert shapes["joint_blocks.0.x_block.adaLN_modulation.1.weight"] == (parts * width, width)


@pytest.mark.parametrize(
    "name, shape, words",
    [
        ("pos_embed", None, "incomplete Stable Diffusion 3 file, without 1 of its 89 tensors: 'pos_embed'"),
        ("joint_blocks.1.context_block.mlp.fc2.weight", None, "'joint_blocks.1.context_block.mlp.fc2.weight'"),
        ("joint_blocks.0.x_block.attn2.ln_q.weight", None, "'joint_blocks.0.x_block.attn2.ln_q.weight'"),
        ("joint_blocks.0.x_block.attn.ln_q.weight", None, "'joint_blocks.0.x_block.attn.ln_q.weight'"),
        ("joint_blocks.2.x_block.attn.proj.bias", None, "'joint_blocks.2.x_block.attn.proj.bias'"),
        ("pos_embed", (1, 15, 64), "has 15 learnt positions, no square: it is not one of"),
        ("pos_embed", (2, 16, 64), "tensor 'pos_embed' is (2, 16, 64), expected (1, rows, width)"),
        ("pos_embed", (1, 16, 32), "tensor 'pos_embed' is (1, 16, 32), expected (1, 16, 64)"),
        ("x_embedder.proj.weight", (64, 16, 1, 1), "is (64, 16, 1, 1), expected (64, 16, 2, 2)"),
        ("x_embedder.proj.weight", (64, 32, 2, 2), "is (64, 32, 2, 2), expected (64, 16, 2, 2)"),
        ("final_layer.linear.weight", (62, 64), "gives 62 values per patch"),
        (
            "final_layer.linear.weight",
            (64, 100),
            "hidden size 100 is not a multiple of Stable Diffusion 3's",
        ),
        ("joint_blocks.0.x_block.adaLN_modulation.1.weight", (384, 64), "expected (576, 64)"),
    ],
    ids=str,
)
def test_unfit_files(tmp_path, name, shape, words):
    path = tmp_path / "sd3.safetensors"
    write_checkpoint(str(path), MINI)
    assert words in refusal_of_changed(path, name, shape)


def test_a_first_block_without_its_second_attention_is_no_model_without_any(tmp_path):
    path = tmp_path / "sd3.safetensors"
    write_checkpoint(str(path), replace(MINI, second_attentions=2))
    state = {key: t for key, t in load_file(path).items() if not key.startswith("joint_blocks.0.x_block.attn2")}
    save_file(state, path)
    with pytest.raises(CheckpointError, match="adaLN_modulation"):
        load_model(spec_of(path), CPU)
