"""Random ControlNet files in the layouts that trainers write, and nodes that apply them."""

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import FluxControlNetModel, QwenImageControlNetModel, SD3ControlNetModel
from safetensors.torch import load_file, save_file
from workflows import SMALL, SMALL_QWEN, Graph, Link

from fastusp_backend.models.flux import Flux
from fastusp_backend.models.synthetic import TINY_SD3, random_state

DEEP = replace(SMALL, double_blocks=3, single_blocks=3)
"""A FLUX with enough blocks for residuals that differ from block to block."""


def write_xlabs(folder: Path) -> str:
    """XLabs' kind: it needs no VAE, and ComfyUI repeats its one block's residual 19 times."""
    hidden, generator = SMALL.hidden, torch.Generator().manual_seed(7)
    with torch.device("meta"):
        model = Flux(SMALL)
    state = random_state(model, seed=3, dtype=torch.float32)
    left_out = ("single_blocks", "final_layer")
    tensors = {Flux.file_key(name): t for name, t in state.items() if not name.startswith(left_out)}

    def add(name: str, *shape: int) -> None:
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * torch.tensor(shape[1:]).prod() ** -0.5
        tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.02

    add("controlnet_blocks.0", hidden, hidden)
    add("pos_embed_input", hidden, 64)
    for number in range(8):
        add(f"input_hint_block.{2 * number}", 16, 16 if number else 3, 3, 3)
    return _save(tensors, folder, "xlabs.safetensors")


def write_union(folder: Path) -> str:
    """InstantX's kind for `DEEP`, with modes: ComfyUI gives each of ten residuals to two double blocks in a row, and
    one to all single blocks."""
    with torch.device("meta"):
        model = FluxControlNetModel(
            num_layers=10,
            num_single_layers=1,
            num_attention_heads=DEEP.heads,
            joint_attention_dim=DEEP.context,
            pooled_projection_dim=DEEP.pooled,
            guidance_embeds=True,
            num_mode=4,
        )
    return _save(random_state(model, seed=3, dtype=torch.float32), folder, "union.safetensors")


def write_qwen(folder: Path, base: Path) -> str:
    """InstantX's kind for Qwen-Image: the beginning of the model in `base`, as training starts with it."""
    with torch.device("meta"):
        model = QwenImageControlNetModel(num_layers=1, num_attention_heads=SMALL_QWEN.heads)
    own = {name: p for name, p in model.named_parameters() if name.startswith("controlnet_")}
    tensors, generator = load_file(base), torch.Generator().manual_seed(8)
    for name, parameter in own.items():
        tensors[name] = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return _save({name: tensors[name] for name in model.state_dict()}, folder, "qwen.safetensors")


def write_sd3(folder: Path) -> str:
    """diffusers' kind for `TINY_SD3`: fewer blocks than the model's, which ComfyUI takes one after the other."""
    with torch.device("meta"):
        model = SD3ControlNetModel(
            num_layers=2,
            num_attention_heads=TINY_SD3.heads,
            joint_attention_dim=TINY_SD3.context,
            caption_projection_dim=TINY_SD3.hidden,
            pooled_projection_dim=TINY_SD3.pooled,
            pos_embed_max_size=TINY_SD3.positions,
        )
    state = random_state(model, seed=3, dtype=torch.float32)
    return _save(
        state | {"pos_embed.pos_embed": torch.zeros(model.pos_embed.pos_embed.shape)}, folder, "sd3.safetensors"
    )


def write_sd35(folder: Path) -> str:
    """As much of one of Stability's as tells ComfyUI its kind and sizes."""
    shapes = {"pos_embed_input.proj": (64, 16, 2, 2), "controlnet_blocks.0": (64, 64), "y_embedder.mlp.0": (64, 2048)}
    tensors = {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    return _save(
        tensors | {"transformer_blocks.0.adaLN_modulation.1.bias": torch.ones(384)}, folder, "sd35.safetensors"
    )


def write_qwen_fun(folder: Path) -> str:
    """As much of a Fun ControlNet as tells ComfyUI its kind and sizes."""
    shapes = {"control_img_in": (128, 132), "control_blocks.0.after_proj": (128, 128)}
    shapes |= {"control_blocks.0.attn.to_q": (128, 128), "control_blocks.0.attn.norm_q": (128,)}
    return _save({f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}, folder, "fun.safetensors")


def _save(tensors: dict[str, torch.Tensor], folder: Path, name: str) -> str:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    return name


def applied(graph: Graph, file: str, positive: Link, negative: Link, *, mode: str = "", vae: str = "", **options):
    """Both prompts with a ControlNet. mode: of a union's; vae: `image` or `framed`, for those that need one."""
    net = graph.node("ControlNetLoader", control_net_name=file)
    if mode:
        net = graph.node("SetUnionControlNetType", control_net=net, type=mode)
    image = graph.node("EmptyImage", width=64, height=64, batch_size=1, color=0x40A0F0)
    options = {"strength": 0.8, "start_percent": 0.0, "end_percent": 1.0} | options
    if vae:
        options["vae"] = graph.node("TestVAE", framed=vae == "framed")
    both = {"positive": positive, "negative": negative}
    positive = graph.node("ControlNetApplyAdvanced", **both, control_net=net, image=image, **options)
    return positive, [positive[0], 1]
