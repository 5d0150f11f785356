"""ComfyUI's weight patches (LoRA nodes) as the workers take them."""

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from ..fastusp_backend.config import WeightPatch
from ..fastusp_backend.errors import RequestError
from ..fastusp_backend.models.detection import FamilyConfig
from ..fastusp_backend.pool import WeightPatches, name_of
from ..fastusp_backend.weights import adapters
from .comfyui import swap_scale_shift, weight_adapter
from .host import Unsupported

log = logging.getLogger(__name__)

PREFIX = "diffusion_model."
MERGE = "Load the models with Load Diffusion Model, merge them, save the result with ModelSave, and load that file"

# What each place of an adapter's `weights` tuple is in the formulas of the workers; "alpha" is the number among them,
# "reshape" the shape that the weight is widened to.
_ROLES = {
    weight_adapter.LoRAAdapter: ("lora", ("up", "down", "alpha", "mid", "dora_scale", "reshape")),
    weight_adapter.LoHaAdapter: ("loha", ("w1_a", "w1_b", "alpha", "w2_a", "w2_b", "w1_t", "w2_t", "dora_scale")),
    weight_adapter.LoKrAdapter: (
        "lokr",
        ("w1", "w2", "alpha", "w1_a", "w1_b", "w2_a", "w2_b", "w2_t", "dora_scale"),
    ),
    weight_adapter.GLoRAAdapter: ("glora", ("a1", "a2", "b1", "b2", "alpha", "dora_scale")),
    weight_adapter.OFTAdapter: ("oft", ("blocks", "rescale", "alpha", "dora_scale")),
    weight_adapter.BOFTAdapter: ("boft", ("blocks", "rescale", "alpha", "dora_scale")),
}
_PLAIN = {"diff": "diff", "set": "value"}
"""Kinds that are a tensor alone, and its role."""

Shapes = Mapping[str, tuple[int, ...]]
"""Key of a weight, with prefix -> its shape."""


class _Parts(NamedTuple):
    """What one of ComfyUI's patches is; see WeightPatch."""

    kind: str
    tensors: dict[str, torch.Tensor]
    alpha: float | None = None
    reshape: tuple[int, ...] | None = None


def check_supported(patches: Mapping[str | tuple, object], shapes: Shapes, config: FamilyConfig) -> None:
    """What `ModelPatcher.add_patches` is given: key, or (key, offset, function) -> patch. Raises Unsupported, naming
    the kind, for what the workers cannot do to weights of these shapes, of a model with this config."""
    for key, patch in patches.items():
        name, _offset, function = (key, None, None) if isinstance(key, str) else (*key, None)[:3]
        _swaps(function)
        wide = _parts(patch).reshape
        if wide not in (None, shapes[name]) and config.reshaped(name.removeprefix(PREFIX), wide) is None:
            raise Unsupported(f"a LoRA or patch that turns {name} from {shapes[name]} into {wide}")


def weight_patches(
    patches: Mapping[str, Iterable[tuple]], shapes: Shapes
) -> tuple[WeightPatches, dict[str, tuple[int, ...]]]:
    """A patcher's `patches`, for weights of these shapes; and the shapes that the weights have then.

    A patch that does not fit its weight is left out, with a warning, as ComfyUI leaves it out.
    """
    shapes = dict(shapes)
    weights: dict[str, tuple[WeightPatch, ...]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for key, entries in patches.items():
        fitting = []
        for strength, patch, strength_model, offset, function in entries:
            parts = _parts(patch)
            named = {name_of(tensor): tensor for tensor in parts.tensors.values()}
            wanted = WeightPatch(
                kind=parts.kind,
                tensors={role: name_of(tensor) for role, tensor in parts.tensors.items()},
                strength=float(strength),
                strength_model=float(strength_model),
                alpha=parts.alpha,
                offset=tuple(offset) if offset is not None else None,
                swap_halves=_swaps(function),
                reshape=parts.reshape,
            )
            try:
                shapes[key] = adapters.check(wanted, named, shapes[key])
            except RequestError as error:
                log.warning("FastUSP leaves a weight patch out: %s: %s", key, error)
                continue
            fitting.append(wanted)
            tensors |= named
        if fitting:
            weights[key.removeprefix(PREFIX)] = tuple(fitting)
    return WeightPatches(weights, tensors), shapes


def _parts(patch) -> _Parts:
    if isinstance(patch, weight_adapter.WeightAdapterBase):
        if type(patch) not in _ROLES:
            raise Unsupported(f"a weight patch of kind {patch.name!r}")
        kind, roles = _ROLES[type(patch)]
        given = {role: value for role, value in zip(roles, patch.weights, strict=True) if value is not None}
        alpha, wide = given.pop("alpha", None), given.pop("reshape", None)
        if not isinstance(alpha, int | float | None):
            raise Unsupported(f"a weight patch of kind {patch.name!r} with alpha {alpha!r}")
        if wide is not None and not (isinstance(wide, list) and all(type(n) is int and n > 0 for n in wide)):
            raise Unsupported(f"a LoRA whose reshape_weight {wide!r} is not a shape")
        return _Parts(kind, given, None if alpha is None else float(alpha), None if wide is None else tuple(wide))
    if isinstance(patch, list):
        raise Unsupported("another model's weights (model merging)", MERGE)
    kind, value = ("diff", patch) if len(patch) == 1 else patch
    if kind not in _PLAIN:
        raise Unsupported(f"a weight patch of kind {kind!r}")
    widens = kind == "diff" and len(value) > 1 and value[1].get("pad_weight")
    return _Parts(kind, {_PLAIN[kind]: value[0]}, reshape=tuple(value[0].shape) if widens else None)


def _swaps(function) -> bool:
    """Whether a patch key's function swaps the halves; it is the one that ComfyUI gives to FLUX's keys."""
    if function is None or function is swap_scale_shift:
        return function is not None
    raise Unsupported(f"a weight patch through the function {getattr(function, '__name__', function)!r}")
