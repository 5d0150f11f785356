"""Files that hold another model, or part of one, are refused by name, with the node that loads them."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import load_model, spec_of

from fastusp_backend.errors import CheckpointError
from fastusp_backend.models import other_models
from fastusp_backend.models.detection import OTHERS, RUNS, family_of
from fastusp_backend.models.synthetic import MODELS, TINY_FLUX, write_checkpoint
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = pytest.mark.unit


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as refused:
        load_model(spec_of(path), torch.device("cpu"))
    assert str(path) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "family, keys",
    [
        ("Chroma Radiance", ["nerf_blocks.0.param_generator.weight", "double_blocks.0.img_attn.qkv.weight"]),
        (
            "Chroma in diffusers' key layout",
            ["distilled_guidance_layer.layers.0.linear_1.weight", "single_transformer_blocks.0.attn.to_q.weight"],
        ),
        ("Qwen-Image-Layered", ["time_text_embed.addition_t_embedding.weight", "txt_norm.weight", "img_in.weight"]),
        ("Lens", ["transformer_blocks.0.img_mlp.w1.weight", "txt_norm.weight", "img_in.weight"]),
        (
            "Stable Diffusion 3 in diffusers' key layout",
            ["transformer_blocks.0.norm1_context.linear.weight", "pos_embed.proj.weight"],
        ),
        ("HunyuanVideo", ["double_blocks.0.img_attn.qkv.weight", "img_in.proj.weight"]),
        ("Ovis-Image", ["double_blocks.0.img_attn.qkv.weight", "img_in.weight", "txt_norm.scale"]),
        ("Stable Diffusion U-Net", ["input_blocks.0.0.weight"]),
        ("Stable Diffusion U-Net", ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x.weight"]),
        (
            "not a FLUX.2 or Chroma or FLUX.1 or Qwen-Image or Stable Diffusion 3 or Z-Image transformer",
            ["something.else"],
        ),
        ("no tensors at all", []),
    ],
)
def test_other_families_are_refused_by_name(tmp_path, family, keys):
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(2, 2) for key in keys}, path)
    text = refusal(path)
    assert family in text and text.startswith(OTHERS)


REFINER = "txt_in.individual_token_refiner.blocks.0.norm1.weight"


@pytest.mark.parametrize(
    ("more", "model"),
    [
        (["vector_in.in_layer.weight", "guidance_in.in_layer.weight"], "HunyuanVideo"),
        (["vision_in.proj.0.weight", "byt5_in.fc1.weight", "cond_type_embedding.weight"], "HunyuanVideo 1.5"),
        (["byt5_in.fc1.weight"], "HunyuanImage"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_models_with_flux_blocks_are_no_incomplete_flux(tmp_path, prefix, more, model):
    """Nine in ten of FLUX.1's tensors are there."""
    path = tmp_path / "video.safetensors"
    write_checkpoint(str(path), replace(TINY_FLUX, double_blocks=20, single_blocks=40, hidden=128, heads=1, mlp=128))
    blocks = {name: t[:1].clone() for name, t in load_file(path).items() if name.startswith(("double", "single"))}
    others = [REFINER, "img_in.proj.weight", "time_in.in_layer.weight", "final_layer.linear.weight", *more]
    save_file({prefix + name: t for name, t in (blocks | {name: torch.zeros(1) for name in others}).items()}, path)
    text = refusal(path)
    assert text == f"{OTHERS}: {path} holds {model}, which FastUSP does not run yet; it runs {RUNS}"


@pytest.mark.parametrize(("keys", "model"), other_models._KEYS)
def test_each_model_is_told_by_its_keys_and_by_nothing_less(keys, model):
    """Whatever else is there; a LoRA's names, which go on behind a module's, are none of them."""
    assert other_models.told_by_keys([*keys, "x"]) == model
    assert all(other_models.told_by_keys(set(keys) - {key}) != model for key in keys)
    assert other_models.told_by_keys([key.replace(".weight", ".lora_A.weight") + ".x" for key in keys]) is None


@pytest.mark.parametrize(
    "keys",
    [
        ["transformer_blocks.0.norm1_context.linear.weight", "x_embedder.weight"],
        ["single_transformer_blocks.9.attn.to_q.weight"],
        ["transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"],
    ],
    ids=["first part", "last part", "FLUX.2"],
)
def test_flux_in_diffusers_layout_tells_where_the_original_is(tmp_path, keys):
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(2, 2) for key in keys}, path)
    text = refusal(path)
    for words in (
        "FLUX in diffusers' key layout",
        "flux1-dev.safetensors of black-forest-labs/FLUX.1-dev",
        "ModelSave",
    ):
        assert words in text


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
    assert text.startswith("Load it with") and text.endswith(f"holds {part}, not a diffusion model") and node in text


LAYER = "diffusion_model.double_blocks.0.img_attn.qkv"


@pytest.mark.parametrize(
    ("found", "keys"),
    [
        (
            "a LoRA",
            [
                "lora_unet_single_blocks_0_linear1.alpha",
                *(f"{LAYER}.{leaf}" for leaf in ("lora_A.weight", "lora_B.default.weight", "lora.up.weight")),
                *(f"{LAYER}.{leaf}" for leaf in ("lora_up.weight", "lora_down.weight", "proj_lora1.down.weight")),
                *(f"{LAYER}.{leaf}" for leaf in ("hada_w1_a", "lokr_w1", "lokr_w1_a", "oft_blocks", "a1.weight")),
                *(f"{LAYER}.{leaf}" for leaf in ("diff", "diff_b")),
            ],
        ),
        ("a ControlNet", ["controlnet_x_embedder.bias", "control_blocks.0.x", "control_model.input_hint_block.0.bias"]),
        ("a text encoder", ["text_model.x", "model.layers.0.x", "language_model.x", "transformer.resblocks.0.x"]),
        ("a text encoder", ["enc.blk.0.x", "blk.0.x", "shared.weight", "encoder.block.0.x", "encoder.embed_tokens.x"]),
        ("a text encoder", ["encoder.final_layer_norm.weight"]),
        ("a vision encoder", ["vision_model.x"]),
        ("a VAE", ["encoder.conv_in.weight", "decoder.conv_in.weight", "first_stage_model.x"]),
        ("Chroma Radiance", ["nerf_blocks.0.x"]),
        ("Chroma in diffusers' key layout", ["distilled_guidance_layer.layers.0.linear_1.bias"]),
        ("HunyuanVideo or HunyuanImage", ["img_in.proj.weight"]),
        ("Hunyuan3D", ["latent_in.weight"]),
        ("Stable Diffusion 3 in diffusers' key layout", ["pos_embed.proj.weight"]),
        ("AuraFlow", ["joint_transformer_blocks.0.x"]),
        ("a Stable Diffusion U-Net", ["input_blocks.0.0.weight"]),
        ("Lumina", ["cap_embedder.0.weight"]),
        ("Z-Image in diffusers' key layout", ["all_x_embedder.2-1.weight"]),
        ("a ControlNet of Z-Image's", ["control_layers.0.adaLN_modulation.0.weight"]),
        ("a ControlNet of Z-Image's", ["control_all_x_embedder.2-1.weight"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_single_name_may_tell_what_a_file_holds(found, keys):
    for key in keys:
        with pytest.raises(CheckpointError) as refused:
            family_of({key: TensorInfo((2, 2), torch.float32)}, "file")
        assert f"file holds {found}" in str(refused.value), key


@pytest.mark.parametrize(
    ("whole", "variant", "keys"),
    [
        ("Chroma", "Chroma Radiance", ["nerf_blocks.0.norm.scale"]),
        ("Chroma", "Chroma Radiance", ["nerf_blocks.0.norm.weight"]),
        ("FLUX.1", "Ovis-Image or LongCat-Image", ["double_blocks.0.img_mlp.gate_proj.weight"]),
        ("FLUX.1", "Ovis-Image or LongCat-Image", ["txt_norm.scale"]),
        ("FLUX.1", "Ovis-Image or LongCat-Image", ["txt_norm.weight"]),
        ("Qwen-Image", "Qwen-Image-Layered", ["time_text_embed.addition_t_embedding.weight"]),
        ("Qwen-Image", "Lens", ["transformer_blocks.0.img_mlp.w1.weight"]),
        (
            "Stable Diffusion 3",
            "a Stable Diffusion 3 with a context processor",
            ["context_processor.layers.0.attn.qkv.weight"],
        ),
        ("Z-Image", "Z-Image Omni", ["siglip_embedder.0.weight"]),
        ("Z-Image", "Z-Image in pixel space", ["dec_net.cond_embed.weight"]),
        ("Z-Image", "Lumina 2", ["noise_refiner.0.adaLN_modulation.1.weight"]),
    ],
)
def test_what_has_all_of_a_familys_tensors_may_be_another_model(whole, variant, keys):
    with torch.device("meta"):
        (model,) = (sizes.tiny.build() for sizes in MODELS.values() if sizes.tiny.family == whole)
    shapes = {model.file_key(name): tuple(p.shape) for name, p in model.named_parameters()}
    header = {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()}
    assert family_of(header, "file").family == whole
    with pytest.raises(CheckpointError, match=f"file holds {variant}, which FastUSP does not run yet"):
        family_of(header | {key: TensorInfo((2, 2), torch.bfloat16) for key in keys}, "file")


@pytest.mark.parametrize(
    ("key", "tensor", "family"),
    [
        ("text_model.embeddings.position_ids", torch.arange(77)[None], "a text encoder"),
        ("encoder.down.0.norm.num_batches_tracked", torch.tensor(1), "a VAE"),
        ("nerf_blocks.0.norm.scale", torch.zeros(2, dtype=torch.int8), "Chroma Radiance"),
        ("spiece_model", torch.zeros(8, dtype=torch.uint8), "not a FLUX.2 or Chroma or FLUX.1 or"),
    ],
)
def test_integers_in_other_families_are_no_quantisation(tmp_path, key, tensor, family):
    path = tmp_path / "other.safetensors"
    save_file({key: tensor}, path)
    text = refusal(path)
    assert family in text and "quantised" not in text
