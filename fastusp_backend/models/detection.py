"""Tells from a file's keys which model it holds; refuses by name what FastUSP does not run.

A file is a model's if it has all tensors that this one needs, whatever lies beside them. What else it may be is asked
where some are missing, to say so.
"""

import functools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import torch

from ..errors import CheckpointError
from ..weights.sizes import AnySizes, OneOfEach, Sizes
from ..weights.tensor_info import TensorInfo
from .chroma import ChromaConfig
from .diffusers_layout import ORIGINALS
from .family import FamilyConfig, Transformer
from .flux import FluxConfig
from .flux2 import Flux2Config
from .other_models import told_by_keys, told_by_starts
from .qwen_image import QwenImageConfig
from .sd3 import SD3Config
from .z_image import ZImageConfig

FAMILIES: tuple[type[FamilyConfig], ...] = (
    Flux2Config,
    ChromaConfig,
    FluxConfig,
    QwenImageConfig,
    SD3Config,
    ZImageConfig,
)
"""In the order of asking: files of FLUX.2 and Chroma have FLUX.1's marks, too."""
RUNS = ", ".join(family.runs for family in FAMILIES)
OTHERS = "Use Load Diffusion Model, or Load Checkpoint for an all-in-one checkpoint"
CONTROLNET = "a ControlNet"

# Parts of keys of files that hold no diffusion model, checked in this order: where in the key (its start, or anywhere),
# what the file holds, and the node that loads it. ControlNets alone have the marks of the families they are for.
_PARTS: tuple[tuple[re.Pattern, str, str], ...] = tuple(
    (re.compile(mark), what, advice)
    for mark, what, advice in (
        (
            r"^lora_|lora\d?[._](A|B|up|down)\.|\.(hada_w1|lokr_w1|oft_blocks)|\.diff(_b)?$|\.a1\.weight$",
            "a LoRA",
            "Load it with LoraLoaderModelOnly after USP Loader",
        ),
        (
            r"^control_(layers|noise_refiner|all_x_embedder)\.",
            "a ControlNet of Z-Image's, which FastUSP does not run",
            "Load it with ModelPatchLoader, and the model with Load Diffusion Model",
        ),
        (
            r"^control(net_|_blocks\.|_model\.)",
            CONTROLNET,
            "Load it with Load ControlNet Model and apply it to the prompt",
        ),
        (
            r"^(text_model|model\.layers|language_model|transformer\.resblocks|enc\.blk|blk)\.|^shared\.weight"
            r"|^encoder\.(block|embed_tokens|final_layer_norm)\.",
            "a text encoder",
            "Load it with DualCLIPLoader (FLUX.1), TripleCLIPLoader (Stable Diffusion 3) or CLIPLoader (FLUX.2, "
            "Chroma, Qwen-Image, Z-Image), from models/text_encoders",
        ),
        (r"^vision_model\.", "a vision encoder", "Load it with Load CLIP Vision, from models/clip_vision"),
        (r"^(encoder|decoder|first_stage_model)\.", "a VAE", "Load it with Load VAE, from models/vae"),
    )
)

# Keys that make another model of what has all of a family's: of each group, one must be there.
_VARIANTS: tuple[tuple[tuple[tuple[str, ...], ...], str], ...] = (
    ((("nerf_blocks.0.norm.scale", "nerf_blocks.0.norm.weight"),), "Chroma Radiance"),
    ((("double_blocks.0.img_mlp.gate_proj.weight",),), "Ovis-Image or LongCat-Image"),
    (
        (("double_blocks.0.img_attn.qkv.weight",), ("txt_norm.scale", "txt_norm.weight")),
        "Ovis-Image or LongCat-Image",
    ),
    ((("time_text_embed.addition_t_embedding.weight",),), "Qwen-Image-Layered"),
    ((("transformer_blocks.0.img_mlp.w1.weight",),), "Lens"),
    ((("noise_refiner.0.adaLN_modulation.1.weight",),), "Lumina 2"),
    ((("siglip_embedder.0.weight",),), "Z-Image Omni"),
    ((("dec_net.cond_embed.weight",),), "Z-Image in pixel space"),
    ((("context_processor.layers.0.attn.qkv.weight",),), "a Stable Diffusion 3 with a context processor"),
)
_CHROMA = {f"distilled_guidance_layer.{part}norms.0.{name}" for part in ("", "0.") for name in ("scale", "weight")}
"""By any of which ComfyUI takes a file for Chroma."""
_OTHER_SPELLING = "distilled_guidance_layer.0."
"""Where ComfyUI looks for an approximator too, and loads none."""
_FLUX_IN_DIFFUSERS = ("single_transformer_blocks.", "transformer_blocks.0.norm1_context.linear.")
_BLOCK = re.compile(r"^(\w+)\.(\d+)\.")
_NEARLY = 0.9
"""A file with this share of a family's tensors is one of its files, even without the marks."""


def detect(header: dict[str, TensorInfo], path: str, names: Collection[str] = ()) -> FamilyConfig:
    """The configuration of the model in a file. path, and names, all that the file has, are for the error.

    Raises CheckpointError naming what was found instead (a LoRA, an encoder, another family), or the first tensors that
    are missing.
    """
    family = family_of(header, path, names)
    model, needed = needed_tensors(family, header, path)
    wanted = set(needed)
    own = {key: info for key, info in header.items() if model.module_key(key) in wanted}
    return family.from_sizes(Sizes(own, path, family.family))


def family_of(header: dict[str, TensorInfo], path: str, names: Collection[str] = ()) -> type[FamilyConfig]:
    """The family of a file that has all tensors of one. Otherwise as `detect`."""
    for groups, variant in _VARIANTS:
        if all(any(key in header for key in group) for group in groups):
            raise _foreign(path, variant)
    fit = functools.cache(lambda family: _Fit(family, header, path))
    marked = [family for family in FAMILIES if family.marks <= header.keys()]
    whole = next((family for family in marked if not fit(family).missing), None)
    if whole is FluxConfig and not _CHROMA.isdisjoint(header):
        raise _foreign(path, "a part of Chroma beside FLUX.1")
    if whole is not None:
        return whole
    if (other := told_by_keys(header)) is not None:
        raise _foreign(path, other)
    nearest = _nearest([fit(family) for family in FAMILIES])
    if nearest.share < _NEARLY:
        for found in (header, names):
            if not marked:
                _refuse_parts(found, path)
            _refuse_foreign(found, path)
    if not marked and nearest.share < _NEARLY:
        some = ", ".join(sorted(names or header)[:3]) or "no tensors at all"
        known = " or ".join(family.family for family in FAMILIES)
        raise CheckpointError(
            f"{OTHERS}: {path} is not a {known} transformer in its original key layout: it begins with {some}"
        )
    raise _incomplete(nearest, header, path)


def needed_tensors(
    family: type[FamilyConfig], header: dict[str, TensorInfo], path: str
) -> tuple[type[Transformer], tuple[str, ...]]:
    """The transformer of a family's file, and the names in it of the tensors that it needs, of any shape.

    What is no tensor of the family makes up neither blocks nor parts of its model, nor do some tensors of a block
    behind a gap. Raises CheckpointError, which names `path`, for more blocks than any model has.
    """
    model, names = _needed(family.from_sizes(OneOfEach(header, path, family.family)))
    known = set(names)
    own = {key: name for key in header if _in_first(name := model.module_key(key)) in known}
    whole = Counter(map(_block_of, names))
    there = Counter(map(_block_of, own.values()))
    stray = {
        block
        for block, count in there.items()
        if block and 2 * count < whole[_in_first(block)] and _before(block) not in there
    }
    left = {key: header[key] for key, name in own.items() if _block_of(name) not in stray}
    sizes = AnySizes(left, path, family.family)
    # One block stands for all of its kind: a model of them all would take long to make.
    model, names = _needed(family.from_sizes(OneOfEach(left, path, family.family)))
    if family.blocks_differ:
        return _needed(family.from_sizes(sizes))
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_block_of(name), []).append(name)
    needed = groups.pop("")
    for first, group in groups.items():
        kind = first.partition(".")[0]
        for number in range(sizes.count(kind)):
            needed += [f"{kind}.{number}.{name.removeprefix(first)}" for name in group]
    return model, tuple(needed)


def _block_of(name: str) -> str:
    """The beginning of the names in a tensor's block, such as `double_blocks.3.`; "" for a tensor of no block."""
    found = _BLOCK.match(name)
    return found[0] if found else ""


def _in_first(name: str) -> str:
    """A tensor's name in the first block of its kind."""
    return _BLOCK.sub(r"\1.0.", name)


@functools.lru_cache(maxsize=4 * len(FAMILIES))
def _needed(config: FamilyConfig) -> tuple[type[Transformer], tuple[str, ...]]:
    with torch.device("meta"):
        model = config.build()
    return type(model), tuple(name for name, _ in model.named_parameters())


class _Fit:
    """How a file's tensors fit a family.

    missing: the tensors that it needs and that are not there, by the file's names.
    needed: how many it needs.
    share: how many of those are there, from 0 to 1.
    known: the file's names for those.
    """

    def __init__(self, family: type[FamilyConfig], header: dict[str, TensorInfo], path: str):
        self.family = family
        model, names = needed_tensors(family, header, path)
        wanted = set(names)
        known = {key: name for key in header if (name := model.module_key(key)) in wanted}
        there = set(known.values())
        self.missing = [model.file_key(name) for name in names if name not in there]
        self.needed = len(names)
        self.share = 1 - len(self.missing) / self.needed
        self.known = known.keys()


def _nearest(fits: Sequence[_Fit]) -> _Fit:
    """Of all families the one that an incomplete file is most likely of: one that knows the tensors which tell families
    apart, not just the one that lacks the fewest: FLUX.2 needs few, and FLUX.1 has most of them."""
    telling = set().union(*(fit.known for fit in fits))
    return min(fits, key=lambda fit: (len(telling - fit.known), -fit.share))


def _incomplete(fit: _Fit, header: dict[str, TensorInfo], path: str) -> CheckpointError:
    for mark, part, advice in _PARTS:
        if part == CONTROLNET and any(map(mark.search, header)):
            return CheckpointError(f"{advice}: {path} holds {part}, not a diffusion model")
    if fit.family is ChromaConfig and any(key.startswith(_OTHER_SPELLING) for key in header):
        own = _OTHER_SPELLING.removesuffix("0.")
        return CheckpointError(
            f"Use another file: {path} is a Chroma file whose tensors {_OTHER_SPELLING}* should be {own}*; ComfyUI "
            "loads none of them either"
        )
    return Incomplete(
        f"{_whole(path)}: it is an incomplete {fit.family.family} file, without {len(fit.missing)} of its {fit.needed} "
        f"tensors: {first_of(fit.missing)}",
        fit.missing,
    )


def _before(block: str) -> str:
    """The beginning of the names in the block before one; "" for the first."""
    kind, number, _ = block.split(".")
    return f"{kind}.{int(number) - 1}." if int(number) else ""


class Incomplete(CheckpointError):
    """missing: the names, in the file's layout, of the tensors that a file lacks."""

    def __init__(self, text: str, missing: list[str]):
        super().__init__(text)
        self.missing = missing


def first_of(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


def _whole(path: str) -> str:
    if re.search(r"-\d+-of-\d+\.", path):
        return f"Use the model in one file; {path} is a part of it"
    return f"Download {path} again, or use another file"


def _refuse_parts(names: Collection[str], path: str) -> None:
    """Raises CheckpointError naming what a file holds that is no diffusion model, if that can be told."""
    for mark, part, advice in _PARTS:
        if any(map(mark.search, names)):
            raise CheckpointError(f"{advice}: {path} holds {part}, not a diffusion model")


def _refuse_foreign(names: Collection[str], path: str) -> None:
    """Raises CheckpointError naming the family of a file that is no whole model of ours, if that can be told."""
    if (other := told_by_starts(names)) is not None:
        raise _foreign(path, other)
    if any(name.startswith(_FLUX_IN_DIFFUSERS) for name in names):
        raise CheckpointError(f"{ORIGINALS}. {path} is a part of FLUX in diffusers' key layout, or lacks some of it")


def _foreign(path: str, foreign: str) -> CheckpointError:
    return CheckpointError(f"{OTHERS}: {path} holds {foreign}, which FastUSP does not run yet; it runs {RUNS}")
