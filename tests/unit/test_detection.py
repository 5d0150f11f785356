"""FLUX.1 files of any size are recognised and read; every other file is refused by name."""

import errno
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import SMALL, load_model, spec_of

from fastusp_backend.config import ModelSpec
from fastusp_backend.errors import CheckpointError
from fastusp_backend.models.detection import OTHERS, detect
from fastusp_backend.models.synthetic import FLUX_DEV, write_flux
from fastusp_backend.weights.checkpoint import TensorInfo, read_header

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
MINI = replace(SMALL, hidden=128, heads=1, mlp=256, double_blocks=1, single_blocks=1)


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    path = tmp_path_factory.mktemp("mini") / "mini.safetensors"
    write_flux(str(path), MINI, seed=1)
    return path


@pytest.fixture
def changed(mini, tmp_path):
    """changed(drop=, add=): the mini file with other tensors, as a path."""

    def write(drop=(), add=None):
        tensors = {name: t for name, t in load_file(mini).items() if name not in drop} | (add or {})
        path = tmp_path / "changed.safetensors"
        save_file(tensors, path)
        return path

    return write


def refusal(path, spec: ModelSpec | None = None) -> str:
    with pytest.raises(CheckpointError) as refused:
        load_model(spec or spec_of(path), CPU)
    assert str(path) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        MINI,
        replace(MINI, guidance=False),
        replace(MINI, hidden=384, heads=3, mlp=1536, double_blocks=3, single_blocks=2),
        replace(MINI, double_blocks=12, single_blocks=11),
        replace(MINI, channels=4, context=96, pooled=48),
        replace(MINI, concat_channels=80),
        replace(MINI, concat_channels=16),
    ],
    ids=["dev", "schnell", "wide", "deep", "other inputs", "Fill", "Canny"],
)
def test_sizes_are_read_from_the_file(tmp_path, config):
    path = tmp_path / "flux.safetensors"
    write_flux(str(path), config)
    assert detect(read_header(str(path)), str(path)) == config
    model = load_model(spec_of(path), CPU)
    assert model.config == config
    tensors = load_file(path)
    state = model.state_dict()
    assert len(state) == len(tensors)
    for name, tensor in state.items():
        assert torch.equal(tensor, tensors[model.file_key(name)])


def test_full_sized_headers(tmp_path):
    """FLUX.1 dev's own sizes, without its 24 GB."""
    with torch.device("meta"):
        model = FLUX_DEV.build()
    header = {model.file_key(name): TensorInfo(tuple(p.shape), torch.bfloat16) for name, p in model.named_parameters()}
    assert detect(header, "dev") == FLUX_DEV
    assert len(header) == 780
    assert "double_blocks.18.txt_attn.norm.key_norm.scale" in header


def test_newer_norm_names(mini, changed):
    tensors = load_file(mini)
    scales = [name for name in tensors if name.endswith("_norm.scale")]
    assert len(scales) == 6
    path = changed(scales, {name.replace(".scale", ".weight"): tensors[name] + 1 for name in scales})
    state = load_model(spec_of(path), CPU).state_dict()
    assert torch.equal(state["single_blocks.0.norm.key_norm.scale"], torch.full((128,), 2.0))


@pytest.mark.parametrize("storage, held", [(None, "bfloat16"), ("float32", "float32"), ("float16", "float16")])
def test_storage_type(tmp_path, storage, held):
    path = tmp_path / "half.safetensors"
    write_flux(str(path), MINI, dtype=torch.bfloat16)
    model = load_model(ModelSpec.of_file(str(path), storage=storage, compute="float32"), CPU)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, held)}
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "family, keys",
    [
        ("Chroma", ["distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight", "img_in.weight"]),
        ("Chroma Radiance", ["nerf_blocks.0.param_generator.weight", "double_blocks.0.img_attn.qkv.weight"]),
        ("Qwen-Image-Layered", ["time_text_embed.addition_t_embedding.weight", "txt_norm.weight", "img_in.weight"]),
        ("Lens", ["transformer_blocks.0.img_mlp.w1.weight", "txt_norm.weight", "img_in.weight"]),
        ("Stable Diffusion 3", ["joint_blocks.0.x_block.attn.qkv.weight", "x_embedder.proj.weight"]),
        ("diffusers' key layout", ["transformer_blocks.0.norm1_context.linear.weight", "x_embedder.weight"]),
        ("Stable Diffusion U-Net", ["input_blocks.0.0.weight"]),
        ("Stable Diffusion U-Net", ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x.weight"]),
        ("no FLUX.2 or FLUX.1 or Qwen-Image transformer", ["something.else"]),
        ("no tensors at all", []),
    ],
)
def test_other_families_are_refused_by_name(tmp_path, family, keys):
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(2, 2) for key in keys}, path)
    text = refusal(path)
    assert family in text and text.endswith(OTHERS)


@pytest.mark.parametrize(
    ("part", "node", "keys"),
    [
        ("a LoRA", "LoraLoaderModelOnly after USP Loader", ["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"]),
        ("a LoRA", "LoraLoaderModelOnly", ["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"]),
        ("a LoRA", "LoraLoaderModelOnly", ["diffusion_model.img_in.lora_up.weight", "diffusion_model.img_in.alpha"]),
        ("a LoRA", "LoraLoaderModelOnly", ["double_blocks.0.img_attn.proj.lokr_w1", "img_in.lora_A.default.weight"]),
        ("a LoRA", "LoraLoaderModelOnly", ["double_blocks.0.processor.proj_lora1.down.weight"]),
        ("a LoRA", "LoraLoaderModelOnly", ["unet.mid_block.attn1.processor.to_q_lora.up.weight"]),
        ("a LoRA", "LoraLoaderModelOnly", ["diffusion_model.img_in.diff", "diffusion_model.img_in.diff_b"]),
        ("a ControlNet", "Load ControlNet Model", ["control_blocks.0.after_proj.weight", "control_img_in.weight"]),
        ("a text encoder", "CLIPLoader", ["encoder.embed_tokens.weight", "encoder.final_layer_norm.weight"]),
        ("a ControlNet", "Load ControlNet Model", ["controlnet_blocks.0.weight", "txt_norm.weight", "img_in.weight"]),
        ("a text encoder", "CLIPLoader", ["text_model.encoder.layers.0.mlp.fc1.weight"]),
        ("a text encoder", "CLIPLoader", ["encoder.block.0.layer.0.SelfAttention.k.weight", "shared.weight"]),
        ("a text encoder", "CLIPLoader", ["model.layers.0.self_attn.q_proj.weight", "visual.blocks.0.norm1.weight"]),
        ("a text encoder", "CLIPLoader", ["blk.0.attn_q.weight", "token_embd.weight"]),
        ("a vision encoder", "Load CLIP Vision", ["vision_model.encoder.layers.0.mlp.fc1.weight"]),
        ("a VAE", "Load VAE", ["encoder.conv_in.weight", "decoder.conv_in.weight"]),
        ("a VAE", "Load VAE", ["conv1.weight", "decoder.head.0.gamma"]),
    ],
)
def test_parts_of_a_workflow_are_sent_to_their_nodes(tmp_path, part, node, keys):
    path = tmp_path / "part.safetensors"
    save_file({key: torch.zeros(2, 2) for key in keys}, path)
    text = refusal(path)
    assert f"holds {part}, not a diffusion model: load it with" in text and node in text


@pytest.mark.parametrize(
    ("key", "tensor", "family"),
    [
        ("text_model.embeddings.position_ids", torch.arange(77)[None], "a text encoder"),
        ("encoder.down.0.norm.num_batches_tracked", torch.tensor(1), "a VAE"),
        ("distilled_guidance_layer.in_proj.weight", torch.zeros(2, 2, dtype=torch.int8), "Chroma"),
        ("spiece_model", torch.zeros(8, dtype=torch.uint8), "no FLUX.2 or FLUX.1 or Qwen-Image"),
    ],
)
def test_integers_in_other_families_are_no_quantisation(tmp_path, key, tensor, family):
    path = tmp_path / "other.safetensors"
    save_file({key: tensor}, path)
    text = refusal(path)
    assert family in text and "quantised" not in text


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_quantised_files_are_refused(changed, dtype):
    name = "double_blocks.0.img_attn.qkv.weight"
    path = changed((name,), {name: torch.zeros(384, 128, dtype=dtype)})
    text = refusal(path)
    assert "quantised" in text and name in text and str(dtype).removeprefix("torch.") in text


@pytest.mark.parametrize("channels", [8, 48])
def test_input_channels_of_no_known_model_are_refused(changed, channels):
    assert "it is none of FLUX.1 dev, schnell, Kontext, Fill" in refusal(
        changed(("img_in.weight",), {"img_in.weight": torch.zeros(128, channels * 4)})
    )


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, -1], ids=str)
def test_truncated_files_are_refused(mini, tmp_path, kept):
    data = mini.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(data[: int(len(data) * kept)] if isinstance(kept, float) else data[:kept])
    text = refusal(path)
    assert "truncated" in text and "Download it again" in text


@pytest.mark.parametrize(
    "start",
    [
        b"\xff" * 8,
        (2**40).to_bytes(8, "little"),
        (10).to_bytes(8, "little") + b"not json!!",
        b"GGUF" + b"\x07" * 60,
    ],
    ids=["length", "huge", "json", "gguf"],
)
def test_corrupt_headers_are_refused(mini, tmp_path, start):
    path = tmp_path / "corrupt.safetensors"
    path.write_bytes(start + mini.read_bytes()[len(start) :])
    assert "truncated, corrupt or of another format" in refusal(path)


def test_a_directory_is_refused(tmp_path):
    assert refusal(tmp_path).endswith("Is a directory")


def test_a_file_that_may_not_be_read_says_so(mini, monkeypatch):
    def deny(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("builtins.open", deny)
    assert refusal(mini).endswith("Permission denied")


@pytest.mark.parametrize("kind", ["U16", "U32", "F4", "C64"])
def test_a_type_that_is_not_read_is_named(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    header = json.dumps({"double_blocks.0": {"dtype": kind, "shape": [4], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    text = refusal(path)
    assert f"tensor 'double_blocks.0' has type {kind}, which FastUSP does not read" in text and "corrupt" not in text


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no model file .*absent"):
        read_header(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    "name",
    [
        "final_layer.linear.bias",
        "final_layer.linear.weight",
        "txt_in.weight",
        "double_blocks.0.txt_attn.norm.key_norm.scale",
        "single_blocks.0.linear2.weight",
        "guidance_in.out_layer.bias",
    ],
)
def test_a_missing_tensor_is_named(changed, name):
    text = refusal(changed((name,)))
    assert "missing" in text and name.replace("txt_attn", "txt.attn") in text.replace("txt_attn", "txt.attn")


def test_an_extra_tensor_is_named(changed):
    assert "'single_blocks.0.extra' is unknown" in refusal(changed(add={"single_blocks.0.extra": torch.zeros(1)}))


def test_many_problems_are_counted(changed):
    assert "(and 2 more)" in refusal(changed(add={f"extra.{i}": torch.zeros(1) for i in range(5)}))


@pytest.mark.parametrize(
    "name, shape",
    [
        ("time_in.in_layer.weight", (128, 255)),
        ("single_blocks.0.norm.key_norm.scale", (64,)),
        ("img_in.weight", (100, 64)),
        ("img_in.weight", (128,)),
        ("txt_in.weight", (128,)),
        ("final_layer.linear.weight", ()),
    ],
)
def test_a_wrong_shape_is_named(changed, name, shape):
    text = refusal(changed((name,), {name: torch.zeros(shape)}))
    assert name in text or "hidden size 100" in text


@pytest.mark.parametrize("how", ["replaced", "touched"])
def test_a_file_that_changed_after_the_client_looked_is_refused(mini, tmp_path, how):
    path = tmp_path / "flux.safetensors"
    path.write_bytes(mini.read_bytes())
    spec = spec_of(path)
    if how == "replaced":
        write_flux(str(path), replace(MINI, double_blocks=2))
    else:
        os.utime(path, ns=(spec.mtime_ns, spec.mtime_ns + 1))
    assert "was replaced" in refusal(path, spec)
    assert load_model(spec_of(path), CPU)


def test_a_file_removed_after_the_client_looked_is_refused(mini, tmp_path):
    path = tmp_path / "flux.safetensors"
    path.write_bytes(mini.read_bytes())
    spec = spec_of(path)
    path.unlink()
    assert "cannot read the model file" in refusal(path, spec)
