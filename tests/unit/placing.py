"""Full-size models by their headers alone, and where their weights would lie."""

import functools

import torch

from fastusp_backend.config import FileState, ModelSpec
from fastusp_backend.models.placement import place_file
from fastusp_backend.weights.tensor_info import TensorInfo


@functools.cache
def header(config, dtype=torch.bfloat16):
    with torch.device("meta"):
        model = config.build()
    return {model.file_key(name): TensorInfo(tuple(p.shape), dtype) for name, p in model.named_parameters()}


def spec_with(weights):
    return ModelSpec(path="x", file=FileState(0, 0, 0, 0), storage=None, compute="bfloat16", weights=weights)


def placed(config, ranks=2, *, dtype=torch.bfloat16, weights="auto", **room):
    return place_file(header(config, dtype), spec_with(weights), ranks, **room)
