"""diffusers' transformers on our weights, and what their forward takes."""

import torch
from common import Inputs
from diffusers_weights import to_diffusers

from fastusp_backend.models.chroma import NUMBERS, ChromaConfig
from fastusp_backend.models.family import FamilyConfig, Transformer
from fastusp_backend.models.flux import FluxConfig
from fastusp_backend.models.flux2 import Flux2Config
from fastusp_backend.models.patchify import patch_grid, patchify, unpatchify
from fastusp_backend.models.sd3 import SD3Config
from fastusp_backend.models.z_image import ZImageConfig


def diffusers_model(ours: Transformer) -> torch.nn.Module:
    """Makes diffusers' transformer on the same weights: its parameters are views of ours."""
    import diffusers

    config = ours.config
    state = ours.state_dict()
    if isinstance(config, FluxConfig):
        with torch.device("meta"):
            theirs = diffusers.FluxTransformer2DModel(**flux_sizes(config))
        state = to_diffusers({ours.file_key(name): t for name, t in state.items()}, config.hidden)
    elif isinstance(config, Flux2Config):
        from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

        with torch.device("meta"):
            theirs = diffusers.Flux2Transformer2DModel(
                num_layers=config.double_blocks,
                num_single_layers=config.single_blocks,
                num_attention_heads=config.heads,
                joint_attention_dim=config.context,
                mlp_ratio=config.mlp / config.hidden,
                guidance_embeds=config.guidance,
            )
        state = {ours.file_key(name): t for name, t in state.items()}
        state = convert_flux2_transformer_checkpoint_to_diffusers(state)
    elif isinstance(config, ChromaConfig):
        with torch.device("meta"):
            theirs = diffusers.ChromaTransformer2DModel(**chroma_sizes(config))
        # A buffer of diffusers', which counts the last norm's as those of a model with all blocks.
        embedder = theirs.time_text_embed
        numbers = type(embedder)(num_channels=16, out_dim=NUMBERS).mod_proj
        embedder.mod_proj = torch.cat([numbers[: config.vectors - 2], numbers[-2:]]).to(next(ours.parameters()).device)
        state = to_diffusers({ours.file_key(name): t for name, t in state.items()}, config.hidden)
    elif isinstance(config, SD3Config):
        from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

        with torch.device("meta"):
            theirs = diffusers.SD3Transformer2DModel(**sd3_sizes(config))
        state = convert_sd3_transformer_checkpoint_to_diffusers(dict(state))
    elif isinstance(config, ZImageConfig):
        from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
        from diffusers.models.transformers.transformer_z_image import FeedForward

        with torch.device("meta"):
            theirs = diffusers.ZImageTransformer2DModel(**z_image_sizes(config))
            for block in (*theirs.noise_refiner, *theirs.context_refiner, *theirs.layers):
                block.feed_forward = FeedForward(config.hidden, config.mlp)  # of tiny sizes another width than theirs
        state = convert_z_image_transformer_checkpoint_to_diffusers(
            {ours.file_key(name): t for name, t in state.items()}
        )
    else:
        from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

        with torch.device("meta"):
            theirs = diffusers.QwenImageTransformer2DModel(
                in_channels=4 * config.channels,
                out_channels=config.channels,
                num_layers=config.blocks,
                num_attention_heads=config.heads,
                joint_attention_dim=config.context,
            )
        theirs.pos_embed = QwenEmbedRope(theta=10_000, axes_dim=[16, 56, 56], scale_rope=True)  # holds no parameters
    theirs.load_state_dict(state, assign=True)
    return theirs.eval().requires_grad_(False)


def flux_sizes(config: FamilyConfig) -> dict:
    """Returns the sizes of diffusers' FLUX.1."""
    return {
        "patch_size": 1,
        "in_channels": 4 * config.channels,
        "num_layers": config.double_blocks,
        "num_single_layers": config.single_blocks,
        "attention_head_dim": config.hidden // config.heads,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.context,
        "pooled_projection_dim": config.pooled,
        "guidance_embeds": config.guidance,
    }


def chroma_sizes(config: ChromaConfig) -> dict:
    """Returns the sizes of diffusers' Chroma, whose MLPs are four times as wide as a token."""
    return {
        "in_channels": 4 * config.channels,
        "num_layers": config.double_blocks,
        "num_single_layers": config.single_blocks,
        "attention_head_dim": config.hidden // config.heads,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.context,
        "approximator_hidden_dim": config.approximator,
    }


def sd3_sizes(config: SD3Config) -> dict:
    """Returns the sizes of diffusers' Stable Diffusion 3, whose MLPs are four times as wide as a token."""
    return {
        "in_channels": config.channels,
        "out_channels": config.channels,
        "num_layers": config.blocks,
        "attention_head_dim": config.hidden // config.heads,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.context,
        "caption_projection_dim": config.hidden,
        "pooled_projection_dim": config.pooled,
        "pos_embed_max_size": config.positions,
        "dual_attention_layers": tuple(range(config.second_attentions)),
        "qk_norm": "rms_norm" if config.normed else None,
    }


def z_image_sizes(config: ZImageConfig) -> dict:
    """Returns the sizes of diffusers' Z-Image, whose refiners of text and image are as many."""
    return {
        "in_channels": config.channels,
        "dim": config.hidden,
        "n_layers": config.blocks,
        "n_refiner_layers": config.image_blocks,
        "n_heads": config.heads,
        "n_kv_heads": config.heads,
        "cap_feat_dim": config.context,
    }


def latents(config: FamilyConfig, output: torch.Tensor | list[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
    """Returns what diffusers' forward gave as latents: those of Stable Diffusion 3 and Z-Image cut patches by
    themselves, and Z-Image's runs the other way."""
    if isinstance(config, ZImageConfig):
        return -torch.stack(list(output)).squeeze(2)
    return output if isinstance(config, SD3Config) else unpatchify(output, grid, config.patch)


def arguments(config: FamilyConfig, given: Inputs, dtype: torch.dtype) -> list[dict]:
    """Returns what diffusers' forward takes for each prompt."""
    x, b = given.x, given.x.shape[0]
    if isinstance(config, SD3Config):
        shared = {"hidden_states": x.to(dtype), "timestep": given.timestep.to(x.device, dtype), "return_dict": False}
        prompts = [{"encoder_hidden_states": p.context, "pooled_projections": p.y} for p in given.prompts]
        return [shared | prompt for prompt in prompts]
    if isinstance(config, ZImageConfig):
        images, t = list(x.to(dtype)[:, :, None]), 1 - given.timestep.to(x.device)
        return [{"x": images, "t": t, "cap_feats": list(p.context), "return_dict": False} for p in given.prompts]
    grid = patch_grid(*x.shape[-2:], config.patch)
    shared = {"hidden_states": patchify(x, config.patch).to(dtype), "timestep": given.timestep.to(x.device, dtype)}
    axes = {FluxConfig: 3, ChromaConfig: 3, Flux2Config: 4}.get(type(config))
    if axes:
        shared["img_ids"] = torch.zeros(grid[0] * grid[1], axes, device=x.device)
        shared["img_ids"][:, 1:3] = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in grid))
    else:
        shared["img_shapes"] = [[(1, *grid)]] * b
    found = []
    for prompt in given.prompts:
        own = {"encoder_hidden_states": prompt.context, "return_dict": False}
        if axes:
            text = prompt.context.shape[1]
            own["txt_ids"] = torch.zeros(text, axes, device=x.device)
        if axes and not isinstance(config, ChromaConfig):
            own["guidance"] = prompt.guidance
        if isinstance(config, FluxConfig):
            own["pooled_projections"] = prompt.y
        elif axes == 4:
            own["txt_ids"][:, 3] = torch.arange(text)
        found.append(shared | own)
    return found
