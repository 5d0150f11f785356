"""Which parts of their weights the families' blocks multiply in fp8, told by the blocks themselves: one evaluation on
the meta device."""

from dataclasses import fields, replace
from typing import NamedTuple
from unittest.mock import patch

import torch

from fastusp_backend.attention.usp import ALL, IN_TURN, KEYS_AND_VALUES, ONLY_Q
from fastusp_backend.models import layers
from fastusp_backend.models.family import FamilyConfig
from fastusp_backend.models.positions import References
from fastusp_backend.models.segments import Segments
from fastusp_backend.models.synthetic import CHROMA, FLUX2_DEV, FLUX_DEV, QWEN_IMAGE, SD35_LARGE, SD35_MEDIUM, Z_IMAGE

FULL_SIZE = {
    "FLUX.1": FLUX_DEV,
    "FLUX.2 dev": FLUX2_DEV,
    "FLUX.2 klein 4B": replace(FLUX2_DEV, hidden=3072, heads=24, mlp=9216, context=7680, guidance=False),
    "FLUX.2 klein 9B": replace(FLUX2_DEV, hidden=4096, heads=32, mlp=12288, context=12288, guidance=False),
    "Chroma": CHROMA,
    "Qwen-Image": QWEN_IMAGE,
    "Stable Diffusion 3.5 large": SD35_LARGE,
    "Stable Diffusion 3.5 medium": replace(SD35_MEDIUM, second_attentions=1),
    "Z-Image": Z_IMAGE,
}


class Part(NamedTuple):
    """Of a weight: n rows of k columns, rows `pitch` values apart, from value `offset` on; and whether a bias is
    added."""

    n: int
    k: int
    pitch: int
    offset: int
    bias: bool


class _Joint:
    """Attention that gives tokens of the right shape."""

    def __init__(self, tokens: torch.Tensor, text: int, parts: tuple[slice, ...]):
        self.parts = parts
        self.collect = lambda: tokens
        self.collect_text = lambda: tokens[:, :text]
        self.collect_image = lambda: tokens[:, text:]

    def project(self, *_, **__) -> None:
        pass

    def attend(self, *, text_first: bool = False, image_only: bool = False) -> None:
        pass


def parts(config: FamilyConfig) -> set[Part]:
    """Of all products of two blocks of each kind: what comes after a block differs for the last."""
    counts = {field.name: 2 for field in fields(config) if field.name.endswith("blocks")}
    found = set()

    def record(x, weight, scales, bias):
        found.add(Part(*weight.shape, weight.stride(0), weight.storage_offset(), bias is not None))
        assert scales.shape == (len(weight), 1) and (bias is None or bias.shape == (len(weight),))
        return x.values.new_empty(*x.values.shape[:2], len(weight), dtype=x.dtype)

    with torch.device("meta"), patch.object(layers, "product", record):
        model = replace(config, **counts).build().bfloat16()
        for layer in model.products():
            layer.stored = layer.stored.by_rows()
        txt, img = torch.empty(2, 1, 3, config.hidden, dtype=torch.bfloat16)
        patches = torch.empty(1, 3, config.patch**2 * (config.channels + config.concat_channels), dtype=torch.bfloat16)
        mods = model.split_modulations(torch.empty(1, 1, model.modulation_width, dtype=torch.bfloat16))
        tokens = torch.empty(1, 6, config.hidden, dtype=torch.bfloat16)
        rope = model.rope(3, (1, 3), References(config.patch), img.device)
        rope = tuple(tuple(table[:3] for table in tables) for tables in rope)  # without what fills a stream up
        for projected in ((ALL,), IN_TURN, (KEYS_AND_VALUES, ONLY_Q)):
            joint = _Joint(tokens, 3, projected)
            model(patches, txt, mods, rope, joint, Segments(img.device, fused=False, fp8=True))
    return found
