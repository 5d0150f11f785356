"""Random LoRA files in the names and kinds that trainers write."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from workflows import Comparison, Graph, Link, difference

RANK = 4


class _Random:
    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """N(0, scale^2 / last dim)."""
        return torch.randn(shape, generator=self._generator) * (scale * shape[-1] ** -0.5)


def shapes(model: Path) -> tuple[int, int]:
    """The width of a FLUX file's MLPs and its hidden size."""
    with safe_open(model, "pt") as file:
        return tuple(file.get_slice("double_blocks.0.img_mlp.0.weight").get_shape())


def bfl_names(hidden: int, mlp: int, seed: int) -> dict[str, torch.Tensor]:
    """Fused projections, as kohya's trainer names them, with alpha."""
    random, tensors = _Random(seed), {}
    for name, out, width in (
        ("double_blocks_0_img_attn_qkv", 3 * hidden, hidden),
        ("double_blocks_0_txt_mlp_2", hidden, mlp),
        ("double_blocks_0_img_mod_lin", 6 * hidden, hidden),
        ("single_blocks_0_linear1", 3 * hidden + mlp, hidden),
    ):
        tensors |= {
            f"lora_unet_{name}.lora_up.weight": random(out, RANK),
            f"lora_unet_{name}.lora_down.weight": random(RANK, width),
            f"lora_unet_{name}.alpha": torch.tensor(2.0),
        }
    return tensors


def diffusers_names(hidden: int, mlp: int, seed: int) -> dict[str, torch.Tensor]:
    """Split projections: slices of fused weights; norm_out's halves are the other way round in the file."""
    random, tensors = _Random(seed), {}
    for name, out, width in (
        *((f"transformer_blocks.0.attn.{x}", hidden, hidden) for x in ("to_q", "to_k", "to_v", "add_k_proj")),
        *((f"single_transformer_blocks.0.attn.{x}", hidden, hidden) for x in ("to_q", "to_v")),
        ("single_transformer_blocks.0.proj_mlp", mlp, hidden),
        ("norm_out.linear", 2 * hidden, hidden),
        ("context_embedder", hidden, 4096),
    ):
        tensors[f"transformer.{name}.lora_A.weight"] = random(RANK, width).to(torch.bfloat16)
        tensors[f"transformer.{name}.lora_B.weight"] = random(out, RANK).to(torch.bfloat16)
    return tensors


def all_kinds(hidden: int, mlp: int, seed: int) -> dict[str, torch.Tensor]:
    """LoHa, LoKr, GLoRA, OFT, BOFT, DoRA by row and by column, differences, values; and what ComfyUI leaves out: an
    unknown key, a wrong shape."""
    random = _Random(seed)
    kinds = {
        "double_blocks.0.img_mlp.0": {
            "hada_w1_a": random(mlp, RANK),
            "hada_w1_b": random(RANK, hidden),
            "hada_w2_a": random(mlp, RANK),
            "hada_w2_b": random(RANK, hidden, scale=4),
            "alpha": torch.tensor(3.0),
        },
        "double_blocks.0.img_attn.proj": {
            "lokr_w1": random(8, 16),
            "lokr_w2_a": random(hidden // 8, RANK),
            "lokr_w2_b": random(RANK, hidden // 16),
            "alpha": torch.tensor(2.0),
        },
        "double_blocks.0.txt_attn.proj": {
            "a1.weight": random(hidden, RANK),
            "a2.weight": random(RANK, hidden),
            "b1.weight": random(hidden, RANK),
            "b2.weight": random(RANK, hidden),
        },
        "single_blocks.0.linear2": {
            "lora_up.weight": random(hidden, RANK),
            "lora_down.weight": random(RANK, hidden + mlp),
            "alpha": torch.tensor(1.0),
            "dora_scale": 1 + random(hidden, 1, scale=0.1),
        },
        "double_blocks.0.img_mlp.2": {
            "lora_up.weight": random(hidden, RANK),
            "lora_down.weight": random(RANK, mlp),
            "dora_scale": 1 + random(1, mlp, scale=0.1),
        },
        "double_blocks.0.txt_mlp.2": {
            "oft_blocks": random(8, hidden // 8, hidden // 8),
            "alpha": torch.tensor(1.5),
        },
        "double_blocks.0.txt_attn.qkv": {
            "oft_blocks": random(3, 3 * hidden // 8, 8, 8),
            "rescale": 1 + random(3 * hidden, 1, scale=0.1),
            "alpha": torch.tensor(0.0),
        },
        "double_blocks.0.txt_attn.norm.key_norm": {"set_weight": 1 + random(128)},
        "img_in": {"diff": random(hidden, 64), "diff_b": random(hidden)},
        "double_blocks.0.txt_mlp.0": {
            "lora_up.weight": random(mlp, RANK),
            "lora_down.weight": random(RANK, hidden + 1),
        },
        "double_blocks.99.txt_mlp.0": {"diff_b": random(mlp)},
    }
    return {f"diffusion_model.{key}.{part}": t for key, parts in kinds.items() for part, t in parts.items()}


def control(model: Path, seed: int = 9) -> dict[str, torch.Tensor]:
    """BFL's own for Canny and Depth: all matrices and biases, norms as values, and an input that takes an image."""
    random, tensors = _Random(seed), {}
    with safe_open(model, "pt") as file:
        sizes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - no mapping
    for key, shape in sizes.items():
        layer, _, leaf = key.rpartition(".")
        if leaf == "scale":
            tensors[key] = 1 + random(*shape)
        elif leaf == "weight":
            out, width = shape
            tensors[f"{layer}.lora_A.weight"] = random(RANK, 2 * width if layer == "img_in" else width)
            tensors[f"{layer}.lora_B.weight"] = random(out, RANK)
            tensors[f"{layer}.lora_B.bias"] = random(out)
    return tensors


def qwen_names(hidden: int, seed: int) -> dict[str, torch.Tensor]:
    random, tensors = _Random(seed), {}
    block = "transformer_blocks.0"
    for name, out, width in (
        (f"{block}.attn.to_q", hidden, hidden),
        (f"transformer.{block}.attn.add_v_proj", hidden, hidden),
        (f"diffusion_model.{block}.img_mlp.net.2", hidden, 4 * hidden),
        (f"{block}.img_mod.1", 6 * hidden, hidden),
    ):
        tensors[f"{name}.lora_A.weight"] = random(RANK, width)
        tensors[f"{name}.lora_B.weight"] = random(out, RANK)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


def sd3_names(hidden: int, seed: int) -> dict[str, torch.Tensor]:
    """diffusers' names, whose queries, keys and values are parts of one weight, the file's own, and kohya's."""
    random, tensors = _Random(seed), {}
    block = "transformer.transformer_blocks.0"
    for name, out, width in (
        (f"{block}.attn.to_q", hidden, hidden),
        (f"{block}.attn.add_v_proj", hidden, hidden),
        (f"{block}.attn2.to_k", hidden, hidden),
        (f"{block}.ff.net.2", hidden, 4 * hidden),
        ("transformer.norm_out.linear", 2 * hidden, hidden),
        ("diffusion_model.joint_blocks.1.x_block.adaLN_modulation.1", 6 * hidden, hidden),
    ):
        tensors[f"{name}.lora_A.weight"] = random(RANK, width)
        tensors[f"{name}.lora_B.weight"] = random(out, RANK)
    tensors["diffusion_model.x_embedder.proj.lora_A.weight"] = random(RANK, 16, 2, 2)
    tensors["diffusion_model.x_embedder.proj.lora_B.weight"] = random(hidden, RANK, 1, 1)
    for name, out, width in (
        ("joint_blocks_0_context_block_attn_qkv", 3 * hidden, hidden),
        ("joint_blocks_1_x_block_mlp_fc1", 4 * hidden, hidden),
    ):
        tensors |= {
            f"lora_unet_{name}.lora_up.weight": random(out, RANK),
            f"lora_unet_{name}.lora_down.weight": random(RANK, width),
            f"lora_unet_{name}.alpha": torch.tensor(2.0),
        }
    return tensors


def chroma_names(hidden: int, approximator: int, seed: int) -> dict[str, torch.Tensor]:
    """The file's own names, as ai-toolkit and kohya's trainer write them, and diffusers'."""
    random, tensors = _Random(seed), {}
    for name, out, width in (
        ("diffusion_model.double_blocks.0.img_attn.qkv", 3 * hidden, hidden),
        ("diffusion_model.single_blocks.1.linear2", hidden, 5 * hidden),
        ("diffusion_model.distilled_guidance_layer.layers.3.in_layer", approximator, approximator),
        ("diffusion_model.distilled_guidance_layer.out_proj", hidden, approximator),
        ("transformer.transformer_blocks.1.attn.add_k_proj", hidden, hidden),
        ("transformer.transformer_blocks.0.ff_context.net.2", hidden, 4 * hidden),
        ("transformer.single_transformer_blocks.0.proj_mlp", 4 * hidden, hidden),
    ):
        tensors[f"{name}.lora_A.weight"] = random(RANK, width)
        tensors[f"{name}.lora_B.weight"] = random(out, RANK)
    kohya = "lora_unet_double_blocks_1_txt_mlp_0"
    down, up = random(RANK, hidden), random(4 * hidden, RANK)
    more = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    return tensors | {f"{kohya}.{part}": tensor for part, tensor in more.items()}


def z_image_names(hidden: int, mlp: int, seed: int) -> dict[str, torch.Tensor]:
    """diffusers' names, whose queries, keys and values are parts of one weight, the file's own, and kohya's."""
    random, tensors = _Random(seed), {}
    for name, out, width in (
        ("transformer.layers.0.attention.to_q", hidden, hidden),
        ("transformer.layers.0.attention.to_v", hidden, hidden),
        ("transformer.layers.0.attention.to_out.0", hidden, hidden),
        ("transformer.noise_refiner.1.attention.to_k", hidden, hidden),
        ("transformer.context_refiner.1.feed_forward.w2", hidden, mlp),
        ("diffusion_model.layers.0.feed_forward.w3", mlp, hidden),
        ("diffusion_model.noise_refiner.0.attention.qkv", 3 * hidden, hidden),
        ("diffusion_model.context_refiner.0.attention.qkv", 3 * hidden, hidden),
        ("diffusion_model.layers.0.adaLN_modulation.0", 4 * hidden, 256),
        ("diffusion_model.cap_embedder.1", hidden, 2560),
        ("diffusion_model.final_layer.adaLN_modulation.1", hidden, 256),
    ):
        tensors[f"{name}.lora_A.weight"] = random(RANK, width)
        tensors[f"{name}.lora_B.weight"] = random(out, RANK)
    kohya = "lora_unet_layers_0_feed_forward_w1"
    tensors |= {
        f"{kohya}.lora_up.weight": random(mlp, RANK),
        f"{kohya}.lora_down.weight": random(RANK, hidden),
        f"{kohya}.alpha": torch.tensor(2.0),
    }
    return tensors


def flux2_names(hidden: int, mlp: int, seed: int) -> dict[str, torch.Tensor]:
    """BFL's own names and diffusers', whose single blocks have one fused projection in FLUX.2, too."""
    random, tensors = _Random(seed), {}
    for name, out, width in (
        ("diffusion_model.double_blocks.0.img_mlp.0", 2 * mlp, hidden),
        ("diffusion_model.single_blocks.0.linear2", hidden, hidden + mlp),
        ("diffusion_model.double_stream_modulation_txt.lin", 6 * hidden, hidden),
        ("transformer.transformer_blocks.0.attn.to_k", hidden, hidden),
        ("transformer.transformer_blocks.0.ff_context.linear_out", hidden, mlp),
        ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", 3 * hidden + 2 * mlp, hidden),
        ("transformer.norm_out.linear", 2 * hidden, hidden),
    ):
        tensors[f"{name}.lora_A.weight"] = random(RANK, width)
        tensors[f"{name}.lora_B.weight"] = random(out, RANK)
    return tensors


def write(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors")
    return f"{name}.safetensors"


def check_stack(
    host, file: str, names: list[str], gpus: str, positive: Callable[[Graph], Link], *, steps: int = 1
) -> None:
    """Two LoRAs one behind the other change what the workers give as they change what stock gives, and change it.
    ComfyUI knows all their names."""
    unknown = host.log_text().count("lora key not loaded")
    both = Comparison()
    graph = both.graph
    models, prompt = [graph.usp(gpus, file=file), graph.stock(file)], positive(graph)
    plain = graph.save(graph.sample(models[1], positive=prompt, negative=prompt, steps=steps))
    for name, strength in zip(names, (0.8, -0.4), strict=True):
        given = {"lora_name": name, "strength_model": strength}
        models = [graph.node("LoraLoaderModelOnly", model=model, **given) for model in models]
    both.add("stack", *(graph.sample(model, positive=prompt, negative=prompt, steps=steps) for model in models))
    latents = both.check(host).latents
    assert difference(latents[both.pairs[0][4]], latents[plain]) > 1e-2
    assert host.log_text().count("lora key not loaded") == unknown
