"""The formulas of weight patches: LoRA and its kin, in float32.

LoRA (arXiv 2106.09685), LoHa and LoKr (LyCORIS, arXiv 2309.14859), GLoRA (arXiv 2306.07967), OFT (arXiv 2306.07280)
and BOFT (arXiv 2311.06243), each as a DoRA (arXiv 2402.09353) where there is a `dora_scale`. Which tensors there are,
and where strength, alpha and rank enter, is as in the adapters of ComfyUI 0.3.64 to 0.33.0. Weights are (out, in), or
vectors; adapters of convolutions, with their extra dims, fit where those are 1.

`check` runs the same formulas on the meta device: no second set of rules has to say which shapes fit. `low_rank` does
not change a weight but gives factors, for weights that stay packed.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from ..config import WeightPatch
from ..errors import RequestError

Parts = dict[str, torch.Tensor]

_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_TYPES += (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
"""The types that a patch's tensors may have, of those that the protocol carries: numbers that the formulas take."""


def check(patch: WeightPatch, tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a weight of `shape` has after a patch. Computes nothing; raises RequestError where it does not
    fit."""
    absent = sorted(name for name in patch.tensors.values() if name not in tensors)
    if absent:
        raise RequestError(f"the patch lacks tensor {absent[0]!r}")
    for role, name in patch.tensors.items():
        if getattr(tensors[name], "dtype", None) not in _TYPES or tensors[name].layout != torch.strided:
            what = getattr(tensors[name], "dtype", type(tensors[name]).__name__)
            raise RequestError(f"the {patch.kind} patch's {role!r} is {what}, expected a tensor of plain numbers")
    for number in ("strength", "strength_model", "alpha"):
        if not math.isfinite(getattr(patch, number) or 0.0):
            raise RequestError(f"the {patch.kind} patch's {number} is {getattr(patch, number)}")
    meta = {name: tensors[name].to("meta") for name in patch.tensors.values()}
    try:
        return tuple(apply(torch.empty(shape, dtype=torch.float32, device="meta"), patch, meta).shape)
    except KeyError as error:
        raise RequestError(f"the {patch.kind} patch has no {error.args[0]!r}") from error
    except (RuntimeError, IndexError, ArithmeticError) as error:  # the last: alpha is divided by a rank of 0
        given = ", ".join(f"{role} {tuple(tensors[name].shape)}" for role, name in patch.tensors.items())
        place = f", slice {patch.offset}" if patch.offset else ""
        place += f", to be widened to {patch.reshape}" if patch.reshape else ""
        raise RequestError(
            f"the {patch.kind} patch ({given}) does not fit a weight of shape {tuple(shape)}{place}"
        ) from error


def apply(weight: torch.Tensor, patch: WeightPatch, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Changes `weight`, float32, in place and returns it, or a wider one. The patch must have passed `check`."""
    whole = _widened(weight, patch) if patch.reshape else weight
    _change(whole.narrow(*patch.offset) if patch.offset else whole, patch, tensors)
    return whole


def _in_float32(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Moved in its own type, then converted: factors of 16 bits cross in half the bytes."""
    return tensor.to(device).to(torch.float32)


def _change(weight: torch.Tensor, patch: WeightPatch, tensors: Mapping[str, torch.Tensor]) -> None:
    parts = {role: _in_float32(tensors[name], weight.device) for role, name in patch.tensors.items()}
    if patch.strength_model != 1.0:
        weight *= patch.strength_model
    if patch.kind == "set":
        weight.copy_(parts["value"])
        return
    if patch.kind in _ROTATIONS:
        delta = _ROTATIONS[patch.kind](parts, weight, patch)
        scale = (patch.alpha or 0.0) if "dora_scale" in parts else 1.0
    else:
        delta, rank = _DELTAS[patch.kind](parts, weight)
        scale = patch.alpha / rank if rank is not None and patch.alpha is not None else 1.0
    delta = delta.reshape(weight.shape)
    if patch.swap_halves:
        delta = torch.cat(delta.chunk(2, dim=0)[::-1])
    if "dora_scale" in parts:
        _decompose(weight, scale * delta, parts["dora_scale"], patch.strength)
    else:
        weight += (patch.strength * scale) * delta


def low_rank(
    patches: Sequence[WeightPatch],
    tensors: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What patches that passed `check` add to a matrix of `shape`, as up (rows, R) and down (R, columns) in `dtype`:
    their ranks side by side, strengths and scales in up.

    Raises RequestError for all but plain LoRAs.
    """
    pairs = []
    for patch in patches:
        kind = "DoRA" if "dora_scale" in patch.tensors else _NAMES.get(patch.kind, patch.kind)
        if kind != "LoRA" or patch.strength_model != 1.0:
            raise _unpackable(f"{kind} patches" if kind != "LoRA" else f"strength_model {patch.strength_model:g}")
        if patch.reshape not in (None, tuple(shape)):
            raise _unpackable(f"one that widens a matrix {tuple(shape)} to {patch.reshape}")
        parts = {role: _in_float32(tensors[name], device) for role, name in patch.tensors.items()}
        up, down, rank = _factors(parts)
        up = up * (patch.strength * (patch.alpha / rank if patch.alpha is not None else 1.0))
        if patch.swap_halves:
            up = torch.cat(up.chunk(2, dim=0)[::-1])
        whole = up.new_zeros(shape[0], up.shape[1]), down.new_zeros(down.shape[0], shape[1])
        for dim, (target, factor) in enumerate(zip(whole, (up, down), strict=True)):
            if patch.offset and patch.offset[0] % 2 == dim:
                target = target.narrow(dim, *patch.offset[1:])
            if target.shape != factor.shape:
                raise _unpackable(f"factors {tuple(up.shape)}, {tuple(down.shape)} for a matrix {tuple(shape)}")
            target.copy_(factor)
        pairs.append([factor.to(dtype) for factor in whole])
    ups, downs = zip(*pairs, strict=True)
    return torch.cat(ups, dim=1), torch.cat(downs)


def _unpackable(what: str) -> RequestError:
    return RequestError(
        f"packed weights take plain LoRAs alone, not {what}; set weight_dtype of USP Loader to bf16 or fp16, "
        "which unpacks them when they are loaded, or use an fp8 file"
    )


def _widened(weight: torch.Tensor, patch: WeightPatch) -> torch.Tensor:
    shape = patch.reshape
    if patch.offset or len(shape) != weight.dim() or any(n < had for n, had in zip(shape, weight.shape, strict=True)):
        raise RuntimeError("a weight is widened as a whole, and never made smaller")
    wide = weight.new_zeros(shape)
    wide[tuple(slice(had) for had in weight.shape)] = weight
    return wide


def _decompose(weight: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor, strength: float) -> None:
    """DoRA: the changed weight's rows or columns, whichever `magnitude` counts, take these lengths.

    Rows are divided by the lengths they had before the change, columns by those after it, as ComfyUI has it.
    """
    changed = weight + delta
    by_row = magnitude.shape[0] == weight.shape[0]
    lengths = torch.linalg.vector_norm(weight if by_row else changed, dim=1 if by_row else 0, keepdim=True)
    changed *= magnitude / (lengths + torch.finfo(weight.dtype).eps)
    weight.copy_(changed if strength == 1.0 else weight + strength * (changed - weight))


def _factors(parts: Parts) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A LoRA's up and down, whatever lies between them within down, and its rank."""
    up, down = parts["up"].flatten(1), parts["down"]
    rank = down.shape[0]
    if "mid" in parts:
        down = torch.einsum("o r h w, r i -> o i h w", parts["mid"], down.flatten(1))
    return up, down.flatten(1), rank


def _lora(parts: Parts, _weight) -> tuple[torch.Tensor, int]:
    up, down, rank = _factors(parts)
    return up @ down, rank


def _loha(parts: Parts, _weight) -> tuple[torch.Tensor, int]:
    return _product(parts, "w1") * _product(parts, "w2"), parts["w1_b"].shape[0]


def _lokr(parts: Parts, _weight) -> tuple[torch.Tensor, int | None]:
    """Alpha counts where a factor is itself a product, with the rank of the second one first."""
    w1, w2 = (parts[name] if name in parts else _product(parts, name) for name in ("w1", "w2"))
    if w2.dim() == 4:
        w1 = w1[:, :, None, None]
    rank = next((parts[f"{name}_b"].shape[0] for name in ("w2", "w1") if name not in parts), None)
    return torch.kron(w1.contiguous(), w2.contiguous()), rank


def _product(parts: Parts, name: str) -> torch.Tensor:
    """a b, or the Tucker product with a core, (ranks a, b, kernel)."""
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    if f"{name}_t" not in parts:
        return a @ b
    return torch.einsum("a b h w, b i, a o -> o i h w", parts[f"{name}_t"], b, a)


def _glora(parts: Parts, weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """W A + B, with A and B products; older files have the factors of both in the other order."""
    a1, a2, b1, b2 = (parts[name].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    if old and not (new and not (a2.shape[0] == weight.shape[0] == weight.shape[1])):
        return b2 @ b1 + weight @ a2 @ a1, a1.shape[0]
    return weight @ a1 @ a2 + b1 @ b2, a2.shape[0]


def _diff(parts: Parts, weight: torch.Tensor) -> tuple[torch.Tensor, None]:
    if parts["diff"].shape != weight.shape:
        raise RuntimeError("a difference has the shape of its weight")
    return parts["diff"], None


def _oft(parts: Parts, weight: torch.Tensor, patch: WeightPatch) -> torch.Tensor:
    """k blocks of n rows are turned by a transposed rotation each; the strength counts here and where this is added."""
    turns = _rotations(parts["blocks"], patch.alpha or 0.0)
    rows = weight.unflatten(0, turns.shape[:2])
    return patch.strength * (torch.einsum("k n m, k n ... -> k m ...", turns, rows) - rows)


def _boft(parts: Parts, weight: torch.Tensor, patch: WeightPatch) -> torch.Tensor:
    """A butterfly: each of its stages turns blocks of rows that lie twice as far apart as the last one's. Rotations are
    drawn to the identity by the strength, which counts again where this is added."""
    if patch.alpha is None:
        raise KeyError("alpha")  # without which ComfyUI leaves the patch out
    turns, turned = _rotations(parts["blocks"], patch.alpha), weight
    size = turns.shape[-1]
    turns = patch.strength * turns + (1 - patch.strength) * torch.eye(size, device=turns.device)
    for stage, turn in enumerate(turns):
        order = torch.arange(len(weight), device=weight.device)
        order = order.view(-1, 2, 2**stage * (size // 2)).transpose(1, 2).flatten()
        turned = torch.einsum("k i j, k j ... -> k i ...", turn, turned[order].unflatten(0, (-1, size)))
        turned = turned.flatten(0, 1)[order.argsort()]
    return turned * parts.get("rescale", 1.0) - weight


def _rotations(blocks: torch.Tensor, constraint: float) -> torch.Tensor:
    """Orthogonal matrices by Cayley's transform of what is skew in (..., n, n), whose norm above 0 is limited."""
    skew = blocks - blocks.mT
    if constraint > 0:
        skew = skew * (constraint / (skew.norm() + 1e-8)).clamp(max=1.0)
    eye = torch.eye(skew.shape[-1], device=skew.device)
    return (eye + skew) @ torch.linalg.inv_ex(eye - skew).inverse


_DELTAS = {"lora": _lora, "loha": _loha, "lokr": _lokr, "glora": _glora, "diff": _diff}
"""(parts, weight) -> (what is added at strength 1 and alpha = rank, the rank)."""
_ROTATIONS = {"oft": _oft, "boft": _boft}
"""(parts, weight, patch) -> what is added, times the strength."""
_NAMES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT"}
"""As people write them; the other kinds are words."""
