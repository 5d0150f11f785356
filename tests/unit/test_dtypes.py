"""The types in which a file's weights are stored and computed."""

import pytest
import torch

from fastusp_backend.weights.dtypes import choose_types

pytestmark = pytest.mark.unit


BF16, F16, F32, FP8_FILE = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


@pytest.mark.parametrize(
    "wished, file, gpu_bfloat16, model_float16, expected",
    [
        (None, BF16, True, True, ("bfloat16", "bfloat16", True)),
        (None, F16, True, True, ("float16", "float16", True)),
        (None, F16, True, False, ("float16", "bfloat16", True)),
        (None, F32, True, True, ("bfloat16", "bfloat16", True)),
        (None, BF16, False, True, ("float16", "float16", True)),
        (None, FP8_FILE, True, True, ("bfloat16", "bfloat16", True)),
        (None, FP8_FILE, False, False, ("float16", "float32", True)),
        ("bfloat16", FP8_FILE, True, True, ("bfloat16", "bfloat16", False)),
        ("bfloat16", BF16, False, True, ("bfloat16", "float16", False)),
        ("float32", BF16, True, True, ("float32", "float32", False)),
        ("float8_e4m3fn", BF16, True, True, ("float8_e4m3fn", "bfloat16", False)),
        ("float8_e5m2", BF16, False, True, ("float8_e5m2", "float16", False)),
    ],
)
def test_types_on_gpus(wished, file, gpu_bfloat16, model_float16, expected):
    types = choose_types(wished, file, cpu=False, bfloat16=gpu_bfloat16, float16=model_float16)
    assert (types["storage"], types["compute"], types["keep_quantised"]) == expected


def test_types_on_cpu_ranks():
    for wished in (None, "float16", "float8_e5m2"):
        types = choose_types(wished, BF16, cpu=True, bfloat16=False, float16=True)
        assert types == {"storage": wished, "compute": "float32"}
