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
    flops: floating-point operations of all blocks, over all ranks.
    sent_bytes: what a rank sends, in 16 bits, and receives as well.
    """

    parameters: int
    flops: float
    sent_bytes: float


@functools.cache
def step_cost(config: FamilyConfig, layout: Layout, *, size: tuple[int, int], text: int) -> StepCost:
    """layout: of whose groups one evaluates the prompt. size: pixels (width, height). text: tokens."""
    width, height = (edge // config.downscale for edge in size)
    rows, columns = patch_grid(height, width, config.patch)
    image = config.filled(rows * columns)
    tokens = config.filled(text) + image
    with torch.device("meta"):
        model = config.build()
    large = {id(layer) for layer in model.products()}
    flops, parameters, blocks = 0.0, 0, model.blocks()
    for number, block in enumerate(blocks):
        of_block = sum(layer.weight.numel() for layer in block.modules() if id(layer) in large)
        parameters += of_block
        seen = image if number < config.image_blocks else tokens
        # Each of two streams' layers see that stream's tokens alone.
        flops += (1 if number < config.two_stream_blocks else 2) * of_block * seen
        flops += 4 * seen**2 * config.hidden
        if number < config.second_attentions:
            flops += 4 * image**2 * config.hidden
            # All its layers', counted for half of the tokens, see those of the image alone.
            flops += 4 * config.hidden**2 * (2 * image - tokens)
    ulysses, ring = layout.ulysses, layout.ring
    attended = (len(blocks) - config.image_blocks) * tokens + (config.image_blocks + config.second_attentions) * image
    values = attended / layout.sequence_ranks * config.hidden * (4 * (ulysses - 1) / ulysses + 2 * (ring - 1))
    return StepCost(parameters, flops, values * torch.bfloat16.itemsize)
