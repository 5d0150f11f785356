"""What a step computes and sends, from a model's sizes alone.

A product of L tokens takes 2 L K N floating-point operations, attention over N tokens of C values 4 N^2 C. A rank sends
4 L C (U - 1) / U values a block under Ulysses, and 2 L C (R - 1) around a ring (arXiv 2405.07719).
"""

import functools
from dataclasses import dataclass

import torch

from ..config import Layout
from .family import FamilyConfig
from .patchify import patch_grid


@dataclass(frozen=True, slots=True)
class StepCost:
    """Of one prompt.

    parameters: of all blocks' products.
    text_parameters: those of them that see the text's tokens alone.
    text_tokens: those of a rank.
    flops: floating-point operations of all blocks, over all ranks.
    attention: those of them that attention takes.
    streams: of all blocks, each of which has kernels of its own.
    sent_bytes: what a rank sends, in 16 bits, and receives as well.
    turned_bytes: those of them that go round a ring.
    messages: to how many peers, in all blocks: to all of Ulysses' ranks, and once for each turn of a ring.
    turns: those of them that are a ring's.
    """

    parameters: int
    text_parameters: float
    text_tokens: float
    flops: float
    attention: float
    streams: int
    sent_bytes: float
    turned_bytes: float
    messages: int
    turns: int


@functools.cache
def step_cost(config: FamilyConfig, layout: Layout, *, size: tuple[int, int], text: int) -> StepCost:
    """layout: of whose groups one evaluates the prompt. size: pixels (width, height). text: tokens."""
    width, height = (edge // config.downscale for edge in size)
    rows, columns = patch_grid(height, width, config.patch)
    image = config.filled(rows * columns)
    tokens = config.filled(text) + image
    blocks, both = _parameters(config), config.two_stream_blocks
    alone, second = config.image_blocks, config.second_attentions  # of the image's tokens
    seen = [image] * alone + [tokens] * (len(blocks) - alone)  # by each block
    layers = [2.0 * n * parameters for n, parameters in zip(seen, blocks, strict=True)]
    # Each of two streams' layers see that stream's tokens alone.
    products = sum(layers[:both]) / 2 + sum(layers[both:])
    products += config.image_alone * (2.0 * image - tokens)  # not the half of all tokens
    attention = 4.0 * config.hidden * (sum(n**2 for n in seen) + image**2 * second)
    ulysses, ring = layout.ulysses, layout.ring
    attended = sum(seen) + second * image
    values = attended / layout.sequence_ranks * config.hidden * torch.bfloat16.itemsize
    turned = values * 2 * (ring - 1)
    return StepCost(
        sum(blocks),
        sum(blocks[:both]) / 2,
        config.filled(text) / layout.sequence_ranks,
        products + attention,
        attention,
        len(blocks) + both,
        values * 4 * (ulysses - 1) / ulysses + turned,
        turned,
        (ulysses - 1 + ring - 1) * (len(blocks) + second),
        (ring - 1) * (len(blocks) + second),
    )


@functools.cache
def _parameters(config: FamilyConfig) -> tuple[int, ...]:
    """Of each block's products."""
    with torch.device("meta"):
        model = config.build()
    large = {id(layer) for layer in model.products()}
    return tuple(
        sum(layer.weight.numel() for layer in block.modules() if id(layer) in large) for block in model.blocks()
    )
