"""Z-Image files of any size are recognised and read; what does not fit is named."""

from dataclasses import replace
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import SMALL_Z_IMAGE, load_model, refusal_of_changed, spec_of

from fastusp_backend.errors import CheckpointError
from fastusp_backend.models.detection import detect
from fastusp_backend.models.synthetic import Z_IMAGE, write_checkpoint
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
MINI = replace(SMALL_Z_IMAGE, hidden=128, heads=1, mlp=256, timestep=96, modulation=64, blocks=2)


@pytest.mark.parametrize(
    "config",
    [
        MINI,
        replace(MINI, hidden=256, heads=2, blocks=11),
        replace(MINI, image_blocks=1, context_refiners=3),
        replace(MINI, channels=4, context=96),
    ],
    ids=["as it is", "wide and deep", "other refiners", "other inputs"],
)
def test_sizes(tmp_path, config):
    path = tmp_path / "z_image.safetensors"
    write_checkpoint(str(path), config)
    model = load_model(spec_of(path), CPU)
    assert model.config == config
    tensors = load_file(path)
    assert {model.file_key(name) for name in model.state_dict()} == tensors.keys()
    assert all(torch.equal(tensor, tensors[model.file_key(name)]) for name, tensor in model.state_dict().items())


def test_the_full_sized_header():
    """The model's own sizes and names, without its file."""
    with torch.device("meta"):
        model = Z_IMAGE.build()
    shapes = {model.file_key(name): tuple(p.shape) for name, p in model.named_parameters()}
    header = {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()}
    assert detect(header, "file") == Z_IMAGE
    assert sum(map(prod, shapes.values())) / 1e9 == pytest.approx(6.155, abs=0.001)
    assert len(shapes) == 30 * 13 + 2 * 13 + 2 * 11 + 15
    assert shapes["cap_embedder.0.weight"] == (2560,) and shapes["cap_embedder.1.weight"] == (3840, 2560)
    assert shapes["layers.29.attention.qkv.weight"] == (3 * 3840, 3840)
    assert shapes["layers.29.adaLN_modulation.0.weight"] == (4 * 3840, 256)
    assert shapes["noise_refiner.1.feed_forward.w2.weight"] == (3840, 10240)
    assert shapes["context_refiner.1.attention.q_norm.weight"] == (128,)
    assert "context_refiner.0.adaLN_modulation.0.weight" not in shapes
    assert shapes["t_embedder.mlp.2.weight"] == (256, 1024) and shapes["x_pad_token"] == (1, 3840)
    assert shapes["final_layer.adaLN_modulation.1.weight"] == (3840, 256)


@pytest.mark.parametrize(
    "name, shape, words",
    [
        ("x_pad_token", None, "incomplete Z-Image file, without 1 of its 89 tensors: 'x_pad_token'"),
        ("cap_pad_token", None, "without 1 of its 89 tensors: 'cap_pad_token'"),
        ("cap_embedder.1.bias", None, "'cap_embedder.1.bias'"),
        ("cap_embedder.0.weight", None, "'cap_embedder.0.weight'"),
        ("layers.1.feed_forward.w3.weight", None, "'layers.1.feed_forward.w3.weight'"),
        ("context_refiner.0.attention_norm2.weight", None, "'context_refiner.0.attention_norm2.weight'"),
        ("x_pad_token", (2, 128), "tensor 'x_pad_token' is (2, 128), expected (1, 128)"),
        ("cap_pad_token", (64,), "tensor 'cap_pad_token' is (64,), expected (1, 128)"),
        ("x_embedder.weight", (128, 192), "takes 192 values per patch and gives 64"),
        ("final_layer.linear.weight", (192, 128), "takes 64 values per patch and gives 192"),
        ("layers.0.attention.qkv.weight", (256, 128), "is (256, 128), expected (384, 128)"),
        ("layers.0.adaLN_modulation.0.weight", (768, 64), "is (768, 64), expected (512, 64)"),
    ],
    ids=str,
)
def test_unfit_files(tmp_path, name, shape, words):
    path = tmp_path / "z_image.safetensors"
    write_checkpoint(str(path), MINI)
    assert words in refusal_of_changed(path, name, shape)


def test_a_token_may_lack_its_leading_dimension(tmp_path):
    """As GGUF's writers leave it out."""
    path = tmp_path / "z_image.safetensors"
    write_checkpoint(str(path), MINI)
    state = load_file(path)
    save_file(state | {name: state[name][0] for name in ("x_pad_token", "cap_pad_token")}, path)
    model = load_model(spec_of(path), CPU)
    assert torch.equal(model.x_pad_token, state["x_pad_token"])
    assert torch.equal(model.cap_pad_token, state["cap_pad_token"])


def test_lumina_2_is_another_model(tmp_path):
    """It has most of these tensors, and no learnt tokens that fill its streams up."""
    path = tmp_path / "lumina2.safetensors"
    write_checkpoint(str(path), MINI)
    state = {key.replace("adaLN_modulation.0", "adaLN_modulation.1"): t for key, t in load_file(path).items()}
    save_file({key: t for key, t in state.items() if "pad_token" not in key}, path)
    with pytest.raises(CheckpointError, match="holds Lumina 2, which FastUSP does not run yet"):
        load_model(spec_of(path), CPU)
