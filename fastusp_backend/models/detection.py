"""Tells from a file's keys which model it holds; refuses by name what FastUSP does not run."""

import re

from ..errors import CheckpointError
from ..weights.checkpoint import Sizes, TensorInfo
from ..weights.scales import check_types
from .family import Config
from .flux import FluxConfig
from .flux2 import Flux2Config
from .qwen_image import QwenImageConfig

FAMILIES: tuple[type[Config], ...] = (Flux2Config, FluxConfig, QwenImageConfig)
"""In the order of asking: FLUX.2's files have FLUX.1's marks, too."""
RUNS = ", ".join(family.runs for family in FAMILIES)
OTHERS = "for other diffusion models use Load Diffusion Model, or Load Checkpoint where the file is an all-in-one one"

# Parts of keys of files that hold no diffusion model, checked in this order: where in the key (its start, or anywhere),
# what the file holds, and the node that loads it.
_PARTS: tuple[tuple[re.Pattern, str, str], ...] = tuple(
    (re.compile(mark), what, advice)
    for mark, what, advice in (
        (
            r"^lora_|lora\d?[._](A|B|up|down)\.|\.(hada_w1|lokr_w1|oft_blocks)|\.diff(_b)?$|\.a1\.weight$",
            "a LoRA",
            "load it with LoraLoaderModelOnly after USP Loader",
        ),
        (
            r"^control(net_|_blocks\.|_model\.)",
            "a ControlNet",
            "load it with Load ControlNet Model and apply it to the prompt",
        ),
        (
            r"^(text_model|model\.layers|language_model|transformer\.resblocks|enc\.blk|blk)\.|^shared\.weight"
            r"|^encoder\.(block|embed_tokens|final_layer_norm)\.",
            "a text encoder",
            "load it with DualCLIPLoader (FLUX.1) or CLIPLoader (FLUX.2, Qwen-Image), from models/text_encoders",
        ),
        (r"^vision_model\.", "a vision encoder", "load it with Load CLIP Vision, from models/clip_vision"),
        (r"^(encoder|decoder|first_stage_model)\.", "a VAE", "load it with Load VAE, from models/vae"),
    )
)

# Keys that only one foreign family or variant has, checked in this order. Several share the block names of ours.
_FOREIGN = (
    ("distilled_guidance_layer.", "Chroma"),
    ("nerf_blocks.", "Chroma Radiance"),
    ("double_blocks.0.img_mlp.gate_proj.weight", "Ovis-Image or LongCat-Image"),
    ("time_text_embed.addition_t_embedding.", "Qwen-Image-Layered"),
    ("transformer_blocks.0.img_mlp.w1.weight", "Lens"),
    ("joint_blocks.", "Stable Diffusion 3"),
    ("transformer_blocks.0.norm1_context.linear.weight", "a transformer in diffusers' key layout"),
    ("input_blocks.", "a Stable Diffusion U-Net"),
    ("cap_embedder.", "Lumina or Z-Image"),
)


def detect(header: dict[str, TensorInfo], path: str) -> Config:
    """The configuration of the model in a file. `path` is for the error.

    Raises CheckpointError naming what was found instead (a LoRA, an encoder, another family), the first tensors that
    are missing, or a quantisation that FastUSP does not read.
    """
    for mark, part, advice in _PARTS:
        if any(map(mark.search, header)):
            raise CheckpointError(f"{path} holds {part}, not a diffusion model: {advice}")
    for mark, foreign in _FOREIGN:
        if any(key.startswith(mark) for key in header):
            raise CheckpointError(f"{path} holds {foreign}, which FastUSP does not run yet; it runs {RUNS}; {OTHERS}")
    family = next((family for family in FAMILIES if family.marks <= header.keys()), None)
    if family is None:
        some = ", ".join(sorted(header)[:3]) or "no tensors at all"
        names = " or ".join(family.family for family in FAMILIES)
        raise CheckpointError(
            f"{path} is no {names} transformer in its original key layout: it begins with {some}; {OTHERS}"
        )
    check_types(header, path)
    return family.from_sizes(Sizes(header, path, family.family))
