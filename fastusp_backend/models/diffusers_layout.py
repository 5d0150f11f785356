"""FLUX.1 and FLUX.2 in one file under diffusers' names of their tensors: read as if it had the original ones.

Projections that are one layer in the original are several there, whose rows follow one another; the final layer's
scale lies before its shift. diffusers' `fuse_qkv_projections` makes one layer of some again.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..errors import CheckpointError
from ..weights.contents import Contents
from ..weights.scales import refuse_foreign
from ..weights.tensor_info import TensorInfo

MARKS = frozenset(("x_embedder.weight", "context_embedder.weight", "norm_out.linear.weight", "proj_out.weight"))
"""The names that a whole file has. Parts of one lack some."""
ORIGINALS = (
    "Use the model's original file, at the top of its Hugging Face repository and not in its folder transformer/ "
    "(flux1-dev.safetensors of black-forest-labs/FLUX.1-dev, flux2-dev.safetensors of black-forest-labs/FLUX.2-dev), "
    "or convert this one, if it is in one piece: Load Diffusion Model with ModelSave writes the original layout"
)

Layers = tuple[tuple[str, tuple[str, ...]], ...]
"""The original layer, and diffusers' ones whose rows it has."""

_OUTER: Layers = (
    ("img_in", ("x_embedder",)),
    ("txt_in", ("context_embedder",)),
    ("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    ("time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    ("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    ("guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    ("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    ("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    ("time_in.in_layer", ("time_guidance_embed.timestep_embedder.linear_1",)),
    ("time_in.out_layer", ("time_guidance_embed.timestep_embedder.linear_2",)),
    ("guidance_in.in_layer", ("time_guidance_embed.guidance_embedder.linear_1",)),
    ("guidance_in.out_layer", ("time_guidance_embed.guidance_embedder.linear_2",)),
    ("double_stream_modulation_img.lin", ("double_stream_modulation_img.linear",)),
    ("double_stream_modulation_txt.lin", ("double_stream_modulation_txt.linear",)),
    ("single_stream_modulation.lin", ("single_stream_modulation.linear",)),
    ("final_layer.adaLN_modulation.1", ("norm_out.linear",)),
    ("final_layer.linear", ("proj_out",)),
)
_DOUBLE: Layers = (
    ("img_mod.lin", ("norm1.linear",)),
    ("txt_mod.lin", ("norm1_context.linear",)),
    ("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    ("img_attn.qkv", ("attn.to_qkv",)),
    ("txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    ("txt_attn.qkv", ("attn.to_added_qkv",)),
    ("img_attn.norm.query_norm", ("attn.norm_q",)),
    ("img_attn.norm.key_norm", ("attn.norm_k",)),
    ("txt_attn.norm.query_norm", ("attn.norm_added_q",)),
    ("txt_attn.norm.key_norm", ("attn.norm_added_k",)),
    ("img_attn.proj", ("attn.to_out.0",)),
    ("txt_attn.proj", ("attn.to_add_out",)),
    ("img_mlp.0", ("ff.net.0.proj",)),
    ("img_mlp.2", ("ff.net.2",)),
    ("txt_mlp.0", ("ff_context.net.0.proj",)),
    ("txt_mlp.2", ("ff_context.net.2",)),
    ("img_mlp.0", ("ff.linear_in",)),
    ("img_mlp.2", ("ff.linear_out",)),
    ("txt_mlp.0", ("ff_context.linear_in",)),
    ("txt_mlp.2", ("ff_context.linear_out",)),
)
_SINGLE: Layers = (
    ("modulation.lin", ("norm.linear",)),
    ("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
    ("linear1", ("attn.to_qkv", "proj_mlp")),
    ("linear1", ("attn.to_qkv_mlp_proj",)),
    ("linear2", ("proj_out",)),
    ("linear2", ("attn.to_out",)),
    ("norm.query_norm", ("attn.norm_q",)),
    ("norm.key_norm", ("attn.norm_k",)),
)
_BLOCKS = {"transformer_blocks": ("double_blocks", _DOUBLE), "single_transformer_blocks": ("single_blocks", _SINGLE)}
_BLOCK = re.compile(rf"^({'|'.join(_BLOCKS)})\.(\d+)\.")
_SWAPPED = "final_layer.adaLN_modulation.1."


def with_original_names(contents: Contents) -> Contents:
    """What a file has, under the original names where it has diffusers'; other tensors keep theirs.

    Raises CheckpointError for a quantised one with tensors of its own for that, and for parts of a layer that are not
    alike.
    """
    tensors = contents.tensors
    if not MARKS <= tensors.keys():
        return contents
    refuse_foreign(contents)
    renamed, rest = {}, dict(tensors)
    for name, parts in _layers(tensors):
        infos = [rest.pop(part) for part in parts]
        if name.startswith(_SWAPPED):
            infos = _halves(contents.path, infos[0], parts[0])[::-1]
        renamed[name] = infos[0] if len(infos) == 1 else _joined(contents.path, infos, parts)
    if both := renamed.keys() & rest.keys():
        raise CheckpointError(
            f"{ORIGINALS}. {contents.path} has {min(both)!r} twice, under diffusers' name and under the original one"
        )
    used = {part.rpartition(".")[0] for part in tensors.keys() - rest.keys()}
    split = [key.rpartition(".") for key in rest]
    telling = [f"{layer}.{leaf}" for layer, _, leaf in split if layer in used and leaf not in ("weight", "bias")]
    if telling or contents.scaled or contents.formats:
        which = f" ({telling[0]!r})" if telling else ""
        raise CheckpointError(
            f"{ORIGINALS}. FastUSP does not read quantised FLUX in diffusers' key layout, as in {contents.path}{which}"
        )
    return replace(contents, tensors=renamed | rest)


def _layers(tensors: dict[str, TensorInfo]) -> Iterator[tuple[str, list[str]]]:
    """Yields (original name, the file's names of its parts) of all that are there."""
    places = [("", "", _OUTER)]
    for kind, number in dict.fromkeys(found.groups() for key in tensors if (found := _BLOCK.match(key))):
        original, layers = _BLOCKS[kind]
        places.append((f"{kind}.{number}.", f"{original}.{number}.", layers))
    seen = set()
    for theirs, original, layers in places:
        for layer, parts in layers:
            for leaf in ("weight", "bias"):
                name = f"{original}{layer}.{'scale' if layer.endswith('_norm') else leaf}"
                names = [f"{theirs}{part}.{leaf}" for part in parts]
                if name not in seen and all(part in tensors for part in names):
                    seen.add(name)
                    yield name, names


def _halves(path: str, info: TensorInfo, name: str) -> list[TensorInfo]:
    """The upper and the lower half of a tensor's rows; itself where its shape is refused later."""
    if info.packing and len(info.shape) < 2:
        raise CheckpointError(f"{ORIGINALS}. In {path} {name!r}, of which halves change places, is packed as one")
    if not info.shape or info.shape[0] % 2 or info.dtype is None:
        return [info]
    upper = replace(info, shape=(info.shape[0] // 2, *info.shape[1:]))
    return [upper, replace(upper, start=info.start + upper.size)]


def _joined(path: str, parts: Sequence[TensorInfo], names: Sequence[str]) -> TensorInfo:
    """The tensor that has the rows of these."""
    first = parts[0]
    kinds = {(info.shape[1:], info.dtype, info.packing, info.unknown, bool(info.shape)) for info in parts}
    apart = parts[:3] if len(parts) > 2 else ()  # queries, keys and values, where they are not fused
    if len(kinds) > 1 or len({info.shape[:1] for info in apart}) > 1:
        raise CheckpointError(
            f"{ORIGINALS}. In {path} {', '.join(map(repr, names))}, which make one layer, are not of one type and size"
        )
    if not first.shape or first.packing and len(first.shape) < 2:
        return first  # its shape is refused
    return replace(first, shape=(sum(info.shape[0] for info in parts), *first.shape[1:]), parts=tuple(parts))
