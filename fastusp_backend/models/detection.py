"""Tells from a file's keys which model it holds; refuses by name what FastUSP does not run."""

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

# Keys that only one foreign family or variant has, checked in this order. Several share the block names of ours.
_FOREIGN = (
    ("distilled_guidance_layer.", "Chroma"),
    ("nerf_blocks.", "Chroma Radiance"),
    ("double_blocks.0.img_mlp.gate_proj.weight", "Ovis-Image or LongCat-Image"),
    ("time_text_embed.addition_t_embedding.", "Qwen-Image-Layered"),
    ("controlnet_", "a ControlNet"),
    ("transformer_blocks.0.img_mlp.w1.weight", "Lens"),
    ("joint_blocks.", "Stable Diffusion 3"),
    (
        "transformer_blocks.0.norm1_context.linear.weight",
        "a transformer in diffusers' key layout",
    ),
    ("input_blocks.", "a Stable Diffusion U-Net"),
    ("cap_embedder.", "Lumina or Z-Image"),
    ("text_model.", "a text encoder"),
    ("blk.", "a text encoder"),
    ("encoder.", "a text encoder or VAE"),
    ("lora_", "a LoRA"),
)


def detect(header: dict[str, TensorInfo], path: str) -> Config:
    """The configuration of the model in a file. `path` is for the error.

    Raises CheckpointError naming the family that was found instead, the first tensors that are missing, or a
    quantisation that FastUSP does not read.
    """
    for marker, foreign in _FOREIGN:
        if any(key.startswith(marker) for key in header):
            raise CheckpointError(f"{path} holds {foreign}, which FastUSP does not run yet; it runs {RUNS}")
    family = next((family for family in FAMILIES if family.marks <= header.keys()), None)
    if family is None:
        some = ", ".join(sorted(header)[:3]) or "no tensors at all"
        names = " or ".join(family.family for family in FAMILIES)
        raise CheckpointError(f"{path} is no {names} transformer in its original key layout; it begins with {some}")
    check_types(header, path)
    return family.from_sizes(Sizes(header, path, family.family))
