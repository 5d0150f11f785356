"""Prompts that are sent once: what a rank takes for the same one, and what it forgets."""

import pytest
import torch
from support import SOME_FILE

from fastusp_backend.config import Layout, ModelSpec, Settings
from fastusp_backend.errors import TensorsLost
from fastusp_backend.protocol import Evaluate
from fastusp_backend.worker.prompt_cache import PromptCache

pytestmark = pytest.mark.unit


def evaluate(**more) -> Evaluate:
    model = ModelSpec(path="/m", file=SOME_FILE, storage=None, compute="float32")
    return Evaluate(id=1, model=model, layout=Layout(ulysses=1, ring=1), settings=Settings(), **more)


def test_the_same_tensors_give_the_same_prompt():
    """What is computed from a prompt is kept by the object."""
    cache, context, y = PromptCache(), torch.ones(1, 2, 3), torch.ones(1, 4)
    first = cache.prompt(evaluate(keep={"context": 1, "y": 2}), {"context": context, "y": y})
    assert first.context is context and first.y is y
    reuse = evaluate(reuse={"context": 1, "y": 2})
    assert cache.prompt(reuse, {}) is first
    assert cache.prompt(evaluate(reuse={"context": 1, "y": 2}, reference_method="index"), {}) is not first
    other = cache.prompt(evaluate(reuse={"context": 1}, keep={"y": 3}), {"y": y * 2})
    assert other is not first and other.context is context
    assert cache.prompt(reuse, {}) is first


def test_a_prompt_of_which_a_part_is_not_kept_is_new_each_time():
    cache, context = PromptCache(), torch.ones(1, 2, 3)
    cache.prompt(evaluate(keep={"context": 1}), {"context": context})
    part = evaluate(reuse={"context": 1})
    assert cache.prompt(part, {"y": torch.ones(1, 4)}) is not cache.prompt(part, {"y": torch.ones(1, 4)})


def test_what_is_forgotten_is_gone():
    cache, context = PromptCache(), torch.ones(1, 2, 3)
    cache.prompt(evaluate(keep={"context": 1}), {"context": context})
    cache.prompt(evaluate(keep={"context": 2}, forget=[1]), {"context": context})
    with pytest.raises(TensorsLost, match="'context' should have been kept as 1"):
        cache.prompt(evaluate(reuse={"context": 1}), {})
    cache.clear()
    with pytest.raises(TensorsLost, match="should have been kept as 2"):
        cache.prompt(evaluate(reuse={"context": 2}), {})
