"""Tells from a file's keys which model it holds; refuses by name what FastUSP does not run."""

from ..errors import CheckpointError
from .checkpoint import TensorInfo
from .family import Config
from .flux import FluxConfig

HEAD_DIM = 128

# Keys that only one foreign family has, checked in this order. Several share FLUX's block names.
_FOREIGN = (
    ("double_stream_modulation_img.lin.weight", "FLUX.2"),
    ("distilled_guidance_layer.", "Chroma"),
    ("nerf_blocks.", "Chroma Radiance"),
    ("double_blocks.0.img_mlp.gate_proj.weight", "Ovis-Image or LongCat-Image"),
    ("txt_norm.weight", "Qwen-Image"),
    ("joint_blocks.", "Stable Diffusion 3"),
    ("transformer_blocks.0.norm1_context.linear.weight", "a transformer in diffusers' key layout"),
    ("input_blocks.", "a Stable Diffusion U-Net"),
    ("model.diffusion_model.", "an all-in-one checkpoint"),
    ("cap_embedder.", "Lumina or Z-Image"),
    ("text_model.", "a text encoder"),
    ("encoder.", "a text encoder or VAE"),
    ("lora_", "a LoRA"),
)


def detect(header: dict[str, TensorInfo], path: str) -> Config:
    """The configuration of the model in a file. `path` is for the error.

    Raises CheckpointError naming the family that was found instead, or the first tensors that are missing.
    """
    for marker, family in _FOREIGN:
        if any(key.startswith(marker) for key in header):
            raise CheckpointError(
                f"{path} holds {family}, which FastUSP does not run yet; it runs FLUX.1 dev and schnell"
            )
    if not {"img_in.weight", "double_blocks.0.img_attn.qkv.weight"} <= header.keys():
        some = ", ".join(sorted(header)[:3]) or "no tensors at all"
        raise CheckpointError(
            f"{path} is no FLUX.1 transformer in the original (BFL) key layout; it begins with {some}"
        )
    for name, info in header.items():
        if not info.dtype.is_floating_point or info.dtype.itemsize == 1 or name == "scaled_fp8":
            kind = str(info.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{path} is quantised (tensor {name!r} is {kind}), which FastUSP does not read yet; use a bf16 or "
                f"fp16 file"
            )
    return flux_config(header, path)


def flux_config(header: dict[str, TensorInfo], path: str) -> FluxConfig:
    """FLUX's sizes, as its tensors give them."""

    def shape(name: str) -> tuple[int, int]:
        if name not in header:
            raise CheckpointError(f"{path} is an incomplete FLUX.1 file: tensor {name!r} is missing")
        if len(header[name].shape) != 2:
            raise CheckpointError(
                f"{path} is no FLUX.1 file: tensor {name!r} is {header[name].shape}, expected a matrix"
            )
        return header[name].shape

    def count(blocks: str) -> int:
        return len({key.split(".")[1] for key in header if key.startswith(blocks + ".")})

    hidden, in_features = shape("img_in.weight")
    if hidden % HEAD_DIM:
        raise CheckpointError(f"{path}: hidden size {hidden} is not a multiple of FLUX's head dim, {HEAD_DIM}")
    out_features = shape("final_layer.linear.weight")[0]
    if in_features != out_features:
        raise CheckpointError(
            f"{path} takes {in_features // 4} latent channels and gives {out_features // 4}: it is a FLUX.1 Fill, "
            f"Canny or "
            "Depth model, which FastUSP does not run yet; it runs FLUX.1 dev and schnell"
        )
    return FluxConfig(
        hidden=hidden,
        heads=hidden // HEAD_DIM,
        channels=in_features // 4,
        context=shape("txt_in.weight")[1],
        pooled=shape("vector_in.in_layer.weight")[1],
        mlp=shape("double_blocks.0.img_mlp.0.weight")[0],
        double_blocks=count("double_blocks"),
        single_blocks=count("single_blocks"),
        guidance="guidance_in.in_layer.weight" in header,
    )
