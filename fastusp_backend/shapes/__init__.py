"""Pictures of coloured shapes, which a small model of FLUX.1's layout draws: what the demo, the checks of lossy options
and the example need no download for. MODEL_CARD.md describes the model, benchmarks/train_shapes.py trains it."""

from pathlib import Path

import torch

from ..prompt import Prompt
from .captions import GRAMMAR, TOKENS, WORDS, Caption, embed, numbers
from .check import psnr, unmet
from .latents import decode, encode, preview_factors
from .scenes import examples

MODEL = Path(__file__).with_name("fastusp_shapes.safetensors")
GUIDANCE = 3.5
"""Which changes nothing: the model was trained with any."""


def prompt(captions: list[Caption]) -> Prompt:
    """The embeddings of some captions, a picture of each."""
    context, pooled = embed(torch.tensor([numbers(caption) for caption in captions]))
    return Prompt(context, pooled, torch.full((len(captions),), GUIDANCE))


__all__ = [
    "GRAMMAR",
    "GUIDANCE",
    "MODEL",
    "TOKENS",
    "WORDS",
    "Caption",
    "decode",
    "encode",
    "examples",
    "preview_factors",
    "prompt",
    "psnr",
    "unmet",
]
