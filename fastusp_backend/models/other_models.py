"""Models that FastUSP does not run, told by their keys, so that a refusal says what a file holds.

The keys are those by which ComfyUI's `model_detection` tells them, and of some models those of diffusers' layout. Of
some FastUSP's own families have nearly all tensors: a HunyuanVideo file is no incomplete FLUX.1.
"""

from collections.abc import Collection

_REFINER = "txt_in.individual_token_refiner.blocks.0.norm1.weight"
_ADALN_SINGLE = "adaln_single.emb.timestep_embedder.linear_1.bias"

# A file with all of these keys holds this model; checked in this order.
_KEYS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("clf.1.weight",), "Stable Cascade"),
    (("img2shape.t_embedder.mlp.0.weight",), "TRELLIS.2 or Pixal3D"),
    (("shape2txt.t_embedder.mlp.0.weight",), "TRELLIS.2 or Pixal3D"),
    (("transformer.rotary_pos_emb.inv_freq",), "Stable Audio"),
    (("double_layers.0.attn.w1q.weight",), "AuraFlow"),
    (("mlp_t5.0.weight", "final_layer.linear.weight"), "Hunyuan-DiT"),
    ((_REFINER, "vision_in.proj.0.weight"), "HunyuanVideo 1.5"),
    ((_REFINER, "vector_in.in_layer.weight"), "HunyuanVideo"),
    ((_REFINER,), "HunyuanImage"),
    (("t5_yproj.weight",), "Mochi"),
    ((_ADALN_SINGLE, "pos_embed.proj.bias"), "PixArt in diffusers' key layout"),
    (("video_patch_proj.weight", "audio_patch_proj.weight"), "MiniMax-H3"),
    ((_ADALN_SINGLE, "audio_adaln_single.linear.weight"), "LTX-2"),
    ((_ADALN_SINGLE,), "LTX-Video"),
    (("genre_embedder.weight",), "ACE-Step"),
    (("encoder.lyric_encoder.layers.0.input_layernorm.weight",), "ACE-Step 1.5"),
    (("t_block.1.weight",), "PixArt"),
    (("blocks.block0.blocks.0.block.attn.to_q.0.weight",), "Cosmos"),
    (("llm_adapter.blocks.0.cross_attn.q_proj.weight", "blocks.0.mlp.layer1.weight"), "Anima"),
    (("blocks.0.mlp.layer1.weight", "x_embedder.proj.1.weight"), "Cosmos Predict2"),
    (("lq_proj.latent_proj.0.weight",), "PiD"),
    (("core.pixel_embedder.proj.weight",), "PixelDiT"),
    (("blocks.35.mlp.all.proj_in_gate.weight",), "SeedVR2"),
    (("blocks.31.mlp.all.proj_in_gate.weight",), "SeedVR2"),
    (("head.modulation", "patch_embedding.weight"), "Wan"),
    (("latent_in.weight",), "Hunyuan3D"),
    (("t_embedder.mlp.2.weight", "blocks.0.attn1.k_norm.weight"), "Hunyuan3D 2.1"),
    (("cam_out_layer.weight", "repo_layers.0.final_map.weight"), "TripoSplat"),
    (("t_embedder1.mlp.0.weight", "x_embedder.proj1.weight"), "HiDream-O1"),
    (("caption_projection.0.linear.weight",), "HiDream"),
    (("double_stream_layers.0.img_instruct_attn.processor.img_to_q.weight",), "Boogu-Image"),
    (("time_caption_embed.timestep_embedder.linear_1.bias",), "OmniGen2"),
    (("embed_image_indicator.weight",), "Ideogram 4"),
    (("txtfusion.projector.weight",), "Krea 2"),
    (("visual_transformer_blocks.0.cross_attention.key_norm.weight",), "Kandinsky 5"),
)

# Starts of keys, checked in this order where a file has few tensors of any family's. Some share our block names.
_STARTS = (
    ("nerf_blocks.", "Chroma Radiance"),
    ("distilled_guidance_layer.layers.0.linear_1.", "Chroma in diffusers' key layout"),
    ("img_in.proj.", "HunyuanVideo or HunyuanImage"),
    ("latent_in.", "Hunyuan3D"),
    ("joint_transformer_blocks.", "AuraFlow in diffusers' key layout"),
    ("pos_embed.proj.", "Stable Diffusion 3 in diffusers' key layout"),
    ("input_blocks.", "a Stable Diffusion U-Net"),
    ("all_x_embedder.", "Z-Image in diffusers' key layout"),
    ("cap_embedder.", "Lumina"),
)


def told_by_keys(names: Collection[str]) -> str | None:
    """The model that a file's tensors, by these names, are told to be of; None where none is."""
    there = set(names)
    return next((model for keys, model in _KEYS if there.issuperset(keys)), None)


def told_by_starts(names: Collection[str]) -> str | None:
    """The model that a file, or what is left of it, is likely to be of; None where that cannot be told."""
    return next((model for start, model in _STARTS if any(name.startswith(start) for name in names)), None)
