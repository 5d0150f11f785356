"""FLUX.1's and Chroma's weights in the original key layout, under diffusers' names and cut as its modules hold them."""

import torch

DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
NORMS = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}


def to_diffusers(state: dict[str, torch.Tensor], hidden: int) -> dict[str, torch.Tensor]:
    """A file's tensors under diffusers' names: qkv and linear1 split, the final layer's scale before its shift."""
    out = {}
    for key, tensor in state.items():
        module, _, kind = key.rpartition(".")
        if module in OUTER:
            out[f"{OUTER[module]}.{kind}"] = tensor
            continue
        if module.startswith("distilled_guidance_layer."):
            renamed = module.replace("in_layer", "linear_1").replace("out_layer", "linear_2")
            out[f"{renamed}.{'weight' if kind == 'scale' else kind}"] = tensor
            continue
        if module == "final_layer.adaLN_modulation.1":
            shift, scale = tensor.chunk(2)
            out[f"norm_out.linear.{kind}"] = torch.cat([scale, shift])
            continue
        blocks, index, rest = key.split(".", 2)
        part = rest.rpartition(".")[0]
        if blocks == "double_blocks":
            prefix = f"transformer_blocks.{index}"
            if rest in NORMS:
                out[f"{prefix}.{NORMS[rest]}"] = tensor
            elif part in DOUBLE:
                out[f"{prefix}.{DOUBLE[part]}.{kind}"] = tensor
            else:
                names = {
                    "img_attn.qkv": ("to_q", "to_k", "to_v"),
                    "txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
                }
                for name, piece in zip(names[part], tensor.chunk(3), strict=True):
                    out[f"{prefix}.attn.{name}.{kind}"] = piece
            continue
        prefix = f"single_transformer_blocks.{index}"
        if part == "linear1":
            q, k, v, mlp = tensor.split([hidden, hidden, hidden, len(tensor) - 3 * hidden])
            for name, piece in (("attn.to_q", q), ("attn.to_k", k), ("attn.to_v", v), ("proj_mlp", mlp)):
                out[f"{prefix}.{name}.{kind}"] = piece
        else:
            names = {
                "linear2": "proj_out",
                "modulation.lin": "norm.linear",
                "norm.query_norm": "attn.norm_q",
                "norm.key_norm": "attn.norm_k",
            }
            out[f"{prefix}.{names[part]}.{'weight' if kind == 'scale' else kind}"] = tensor
    return out
