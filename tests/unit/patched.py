"""A small model and patches of it, for the tests of patching."""

from dataclasses import replace

import msgspec
import torch
from support import SMALL, randn, spec_of

from fastusp_backend.config import WeightPatch
from fastusp_backend.engine.checkpoint import Checkpoint
from fastusp_backend.models.layers import Linear

MINI = replace(SMALL, hidden=256, heads=2, mlp=512, double_blocks=1, single_blocks=1, context=256, pooled=256)
QKV, NORM = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.norm.query_norm.scale"
TENSORS = {
    "up": randn(768, 4, seed=1) * 0.1,
    "down": randn(4, 256, seed=2),
    "b": randn(768, seed=3),
    "n": randn(128, seed=4),
}
LORA = WeightPatch(kind="lora", tensors={"up": "up", "down": "down"}, strength=0.7)
PATCHES = {
    f"{QKV}.weight": (LORA,),
    f"{QKV}.bias": (WeightPatch(kind="diff", tensors={"diff": "b"}, strength=1.0),),
    NORM: (WeightPatch(kind="set", tensors={"value": "n"}, strength=1.0),),
}
NONE = dict.fromkeys(PATCHES, ())


def loaded(path, rank: int = 0, ranks: int = 1, **spec) -> Checkpoint:
    checkpoint = Checkpoint(msgspec.structs.replace(spec_of(path), **spec), rank, ranks)
    checkpoint.allocate(torch.device("cpu"))
    checkpoint.read()
    return checkpoint


def in_memory(checkpoint: Checkpoint, key: str):
    return checkpoint.stored(checkpoint.model.module_key(key))


def everything(checkpoint: Checkpoint) -> dict[str, tuple[int, torch.Tensor]]:
    """(address, bytes) of all parameters, and of scales."""
    named = dict(checkpoint.model.named_parameters())
    for name, module in checkpoint.model.named_modules():
        if isinstance(module, Linear) and module.scale is not None:
            named[f"{name}.scale"] = module.scale
    return {
        name: (t.data_ptr(), t.detach().contiguous().clone().view(-1).view(torch.uint8)) for name, t in named.items()
    }


def changed(before, after) -> set[str]:
    assert before.keys() == after.keys()
    assert all(before[name][0] == after[name][0] for name in before), "a tensor has moved"
    return {name for name in before if not torch.equal(before[name][1], after[name][1])}
