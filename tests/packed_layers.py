"""Layers of ComfyUI's packed formats, as their files have them, and what they mean by another way than the product's.

A maker takes rows, columns and a seed and gives (the layer's tensors, what the file says of it, its values in float32).
"""

import torch
from support import randn

from fastusp_backend.weights.packings import PACKINGS
from fastusp_backend.weights.scaled_blocks import with_scales
from fastusp_backend.weights.stored import Stored

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
Layer = tuple[dict[str, torch.Tensor], dict, torch.Tensor]


def integers(low: int, high: int, *shape: int, seed: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def swizzled(scales: torch.Tensor) -> torch.Tensor:
    """(rows, blocks) uint8 in the order that cuBLAS documents: tiles of 128 x 4, in which scale (r, c) is at byte
    r % 32 * 16 + r // 32 * 4 + c; what is padding is not nought."""
    rows, blocks = scales.shape
    height, width = -(-rows // 128), -(-blocks // 4)
    out = torch.full((height * width * 512,), 0x7B, dtype=torch.uint8)
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(blocks), indexing="ij")
    out[(r // 128 * width + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scales
    return out.view(height * 128, width * 4)


def nvfp4(rows: int, columns: int, seed: int) -> Layer:
    codes = integers(0, 16, rows, columns, seed=seed)
    scales = integers(0x60, 0x7E, rows, columns // 16, seed=seed + 1).to(torch.uint8)
    scale = torch.tensor(columns**-0.5 / 600)
    of_block = scales.view(torch.float8_e4m3fn).float().repeat_interleave(16, 1)
    tensors = {
        "weight": (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8),
        "weight_scale": swizzled(scales).view(torch.float8_e4m3fn),
        "weight_scale_2": scale,
        "input_scale": torch.tensor(0.5),
    }
    return tensors, {"format": "nvfp4"}, E2M1[codes] * (scale * of_block)


def mxfp8(rows: int, columns: int, seed: int) -> Layer:
    values = randn(rows, columns, seed=seed).mul_(64).to(torch.float8_e4m3fn)
    powers = integers(-3, 1, rows, columns // 32, seed=seed + 1) - round(torch.tensor(columns).log2().item() / 2) - 5
    factors = torch.exp2(powers.double()).repeat_interleave(32, 1)
    scales = swizzled((powers + 127).to(torch.uint8)).view(torch.float8_e8m0fnu)
    return {"weight": values, "weight_scale": scales}, {"format": "mxfp8"}, (values.double() * factors).float()


def int8_rows(rows: int, columns: int, seed: int) -> Layer:
    quants = integers(-128, 128, rows, columns, seed=seed).to(torch.int8)
    scale = (randn(rows, 1, seed=seed + 1).abs() + 0.5) * columns**-0.5 / 74
    return {"weight": quants, "weight_scale": scale}, {"format": "int8_tensorwise"}, quants.float() * scale


def int8(rows: int, columns: int, seed: int) -> Layer:
    tensors, entry, _ = int8_rows(rows, columns, seed)
    tensors["weight_scale"] = tensors["weight_scale"].mean()
    return tensors, entry, tensors["weight"].float() * tensors["weight_scale"]


def turned(quants: torch.Tensor, group: int) -> torch.Tensor:
    """Rotated back by four values at a time: those 1 apart, then 4, 16 and so on."""
    values, step = quants.double(), 1
    while step < group:
        parts = values.view(len(quants), -1, 4, step)
        values = (parts.sum(2, keepdim=True) / 2 - parts.flip(2)).view_as(quants)
        step *= 4
    return values.float()


def int8_convrot(rows: int, columns: int, seed: int, group: int = 256) -> Layer:
    tensors, entry, _ = int8_rows(rows, columns, seed)
    values = turned(tensors["weight"], group) * tensors["weight_scale"]
    return tensors, entry | {"convrot": True, "convrot_groupsize": group}, values


def int4_convrot(rows: int, columns: int, seed: int, group: int = 256) -> Layer:
    quants = integers(-7, 8, rows, columns, seed=seed)
    scale = (randn(rows, seed=seed + 1).abs() + 0.5) * columns**-0.5 / 4.6
    tensors = {"weight": (quants[:, ::2] & 15 | quants[:, 1::2] << 4).to(torch.int8), "weight_scale": scale}
    entry = {"format": "convrot_w4a4", "convrot_groupsize": group}
    return tensors, entry, turned(quants, group) * scale[:, None]


def fp8(rows: int, columns: int, seed: int) -> Layer:
    values = randn(rows, columns, seed=seed).mul_(64).to(torch.float8_e4m3fn)
    scale = torch.tensor(columns**-0.5 / 64)
    return {"weight": values, "weight_scale": scale}, {"format": "float8_e4m3fn"}, values.float() * scale


LAYERS = {
    "nvfp4": nvfp4,
    "mxfp8": mxfp8,
    "int8": int8,
    "int8_rows": int8_rows,
    "int8_convrot": int8_convrot,
    "int4_convrot": int4_convrot,
    "fp8": fp8,
}


def in_memory(kind: str, rows: int, columns: int, seed: int, **more) -> tuple[Stored, torch.Tensor]:
    """A layer's weight as it lies in memory, by the product's own packing, and its values."""
    tensors, entry, values = LAYERS[kind](rows, columns, seed, **more)
    packing = f"{kind}_{entry['convrot_groupsize']}" if kind.endswith("convrot") else kind.partition("_")[0]
    data, scale = tensors["weight"].view(torch.uint8), tensors["weight_scale"]
    if kind in ("nvfp4", "mxfp8"):
        data = with_scales(data, scale.view(torch.uint8).flatten(), PACKINGS[packing])
        scale = tensors.get("weight_scale_2")
    elif scale.dim() == 1:
        scale = scale[:, None]
    return Stored(data, scale, packing), values
