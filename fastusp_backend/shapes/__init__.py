"""Pictures of coloured shapes, which a small model of FLUX.1's layout draws: what the demo, the checks of lossy options
and the example need no download for. MODEL_CARD.md describes the model, benchmarks/train_shapes.py trains it."""

from pathlib import Path

from .captions import Caption, embed
from .check import unmet
from .latents import decode, encode

MODEL = Path(__file__).with_name("fastusp_shapes.safetensors")

__all__ = ["MODEL", "Caption", "decode", "embed", "encode", "unmet"]
