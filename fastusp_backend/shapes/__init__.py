"""Pictures of coloured shapes, for a small model of FLUX.1's layout that benchmarks/train_shapes.py trains."""

import torch

from ..prompt import Prompt
from .captions import TOKENS, WORDS, Caption, embed, numbers
from .check import psnr, unmet
from .latents import decode, encode
from .scenes import examples

GUIDANCE = 3.5
"""Which changes nothing: the model was trained with any."""


def prompt(captions: list[Caption]) -> Prompt:
    """The embeddings of some captions, a picture of each."""
    context, pooled = embed(torch.tensor([numbers(caption) for caption in captions]))
    return Prompt(context, pooled, torch.full((len(captions),), GUIDANCE))


__all__ = ["GUIDANCE", "TOKENS", "WORDS", "Caption", "decode", "encode", "examples", "prompt", "psnr", "unmet"]
