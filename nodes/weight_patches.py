"""ComfyUI's weight patches (LoRA nodes) as the workers take them."""

import logging
from collections.abc import Iterable, Mapping

import torch

from ..fastusp_backend.config import WeightPatch
from ..fastusp_backend.errors import RequestError
from ..fastusp_backend.pool import WeightPatches, name_of
from ..fastusp_backend.weights import adapters
from .comfyui import swap_scale_shift, weight_adapter
from .host import Unsupported

log = logging.getLogger(__name__)

PREFIX = "diffusion_model."

# What each place of an adapter's `weights` tuple is in the formulas of the workers; "alpha" is the number among them.
_ROLES = {
    weight_adapter.LoRAAdapter: ("lora", ("up", "down", "alpha", "mid", "dora_scale", "reshape")),
    weight_adapter.LoHaAdapter: ("loha", ("w1_a", "w1_b", "alpha", "w2_a", "w2_b", "w1_t", "w2_t", "dora_scale")),
    weight_adapter.LoKrAdapter: (
        "lokr",
        ("w1", "w2", "alpha", "w1_a", "w1_b", "w2_a", "w2_b", "w2_t", "dora_scale"),
    ),
    weight_adapter.GLoRAAdapter: ("glora", ("a1", "a2", "b1", "b2", "alpha", "dora_scale")),
}
_PLAIN = {"diff": "diff", "set": "value"}
"""Kinds that are a tensor alone, and its role."""

Parts = tuple[str, dict[str, torch.Tensor], float | None]


def check_supported(patches: Mapping[str | tuple, object]) -> None:
    """What `ModelPatcher.add_patches` is given: key, or (key, offset, function) -> patch. Raises Unsupported, naming
    the kind, for what the workers cannot do."""
    for key, patch in patches.items():
        _parts(patch)
        if not isinstance(key, str):
            _swaps(key[2] if len(key) > 2 else None)


def weight_patches(patches: Mapping[str, Iterable[tuple]], shapes: Mapping[str, tuple[int, ...]]) -> WeightPatches:
    """A patcher's `patches`, for weights of these shapes (by key, with prefix).

    A patch that does not fit its weight is left out, with a warning, as ComfyUI leaves it out.
    """
    weights: dict[str, tuple[WeightPatch, ...]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for key, entries in patches.items():
        fitting = []
        for strength, patch, strength_model, offset, function in entries:
            kind, parts, alpha = _parts(patch)
            named = {name_of(tensor): tensor for tensor in parts.values()}
            wanted = WeightPatch(
                kind=kind,
                tensors={role: name_of(tensor) for role, tensor in parts.items()},
                strength=float(strength),
                strength_model=float(strength_model),
                alpha=alpha,
                offset=tuple(offset) if offset is not None else None,
                swap_halves=_swaps(function),
            )
            try:
                adapters.check(wanted, named, shapes[key])
            except RequestError as error:
                log.warning("FastUSP leaves a weight patch out: %s: %s", key, error)
                continue
            fitting.append(wanted)
            tensors |= named
        if fitting:
            weights[key.removeprefix(PREFIX)] = tuple(fitting)
    return WeightPatches(weights, tensors)


def _parts(patch) -> Parts:
    """kind, tensors by role, alpha of one of ComfyUI's patches."""
    if isinstance(patch, weight_adapter.WeightAdapterBase):
        if type(patch) not in _ROLES:
            raise Unsupported(f"A weight patch of kind {patch.name!r}")
        kind, roles = _ROLES[type(patch)]
        given = {role: value for role, value in zip(roles, patch.weights, strict=True) if value is not None}
        if "reshape" in given:
            raise Unsupported("A LoRA that widens a layer (such as those of FLUX.1 Canny and Depth)")
        alpha = given.pop("alpha", None)
        return kind, given, float(alpha) if alpha is not None else None
    if isinstance(patch, list):
        raise Unsupported("Another model's weights (model merging)")
    kind, value = ("diff", patch) if len(patch) == 1 else patch
    if kind not in _PLAIN:
        raise Unsupported(f"A weight patch of kind {kind!r}")
    if len(value) > 1 and value[1].get("pad_weight"):
        raise Unsupported("A weight patch that widens a layer (pad_weight)")
    return kind, {_PLAIN[kind]: value[0]}, None


def _swaps(function) -> bool:
    """Whether a patch key's function swaps the halves; it is the one that ComfyUI gives to FLUX's keys."""
    if function is None or function is swap_scale_shift:
        return function is not None
    raise Unsupported(f"A weight patch through the function {getattr(function, '__name__', function)!r}")
