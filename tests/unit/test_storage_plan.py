"""A tensor's form in memory, as its header decides it, against what loading its bytes gives."""

import dataclasses
import math
from itertools import product

import msgspec
import pytest
import torch
from formats import random_blocks
from packed_layers import LAYERS
from support import randn, spec_of

from fastusp_backend.config import ModelSpec
from fastusp_backend.weights import storage_plan
from fastusp_backend.weights.storage_plan import StoragePlan, plan_storage
from fastusp_backend.weights.stored import Stored
from fastusp_backend.weights.tensor_info import FP8, TensorInfo

pytestmark = pytest.mark.unit

SHAPE = (8, 256)
BF16, F32, (E4M3, E5M2) = torch.bfloat16, torch.float32, FP8
FILES = {
    "bf16": TensorInfo(SHAPE, BF16),
    "f32": TensorInfo(SHAPE, F32),
    "f32 with a scale": TensorInfo(SHAPE, F32, scale=0.5),
    "e4m3": TensorInfo(SHAPE, E4M3),
    "e5m2": TensorInfo(SHAPE, E5M2),
    "scaled e4m3": TensorInfo(SHAPE, E4M3, scale=0.5),
    "scaled e5m2": TensorInfo(SHAPE, E5M2, scale=0.5),
    "Q8_0": TensorInfo(SHAPE, F32, packing="Q8_0"),
    "Q4_K": TensorInfo(SHAPE, F32, packing="Q4_K"),
    "nvfp4": TensorInfo(SHAPE, F32, packing="nvfp4", scale=0.5, scales=TensorInfo((128, 16), torch.uint8)),
    "mxfp8": TensorInfo(SHAPE, F32, packing="mxfp8", scales=TensorInfo((128, 8), torch.uint8)),
    "int8": TensorInfo(SHAPE, F32, packing="int8", scale=0.5),
    "int8_rows": TensorInfo(SHAPE, F32, packing="int8", scales=TensorInfo((8,), F32)),
    "int8_convrot": TensorInfo(SHAPE, F32, packing="int8_convrot_256", scales=TensorInfo((8, 1), BF16)),
}
SPECS = {
    "as in the file": {},
    "bf16 or quantised": {"storage": "bfloat16", "keep_quantised": True},
    "bf16": {"storage": "bfloat16"},
    "float32": {"storage": "float32"},
    "e4m3": {"storage": "float8_e4m3fn"},
    "e5m2": {"storage": "float8_e5m2"},
}
USES = ("linear", "fp8_product", "other")


def spec(name: str) -> ModelSpec:
    return msgspec.structs.replace(spec_of(__file__), **SPECS[name])


def raw_of(file: str) -> tuple[torch.Tensor, ...]:
    """The bytes of its data, and those of its scales where they lie apart."""
    info = FILES[file]
    if file in LAYERS:
        tensors, *_ = LAYERS[file](*SHAPE, seed=1)
        scales = tensors["weight_scale"]
        parts = [tensors["weight"]]
        if info.scales is not None:
            parts.append(scales.to(info.scales.dtype) if scales.dtype == F32 else scales)
        return tuple(part.view(torch.uint8).flatten() for part in parts)
    if info.packing:
        return (torch.from_numpy(random_blocks(info.packing, *SHAPE, seed=1)).flatten(),)
    return (randn(*SHAPE, seed=1).to(info.dtype).view(torch.uint8).flatten(),)


@pytest.mark.parametrize("file, types, use", list(product(FILES, SPECS, USES)))
def test_what_is_loaded_has_the_planned_form(file, types, use):
    info = FILES[file]
    plan, raw = plan_storage(info, spec(types), use), raw_of(file)
    assert len(raw[0]) == info.size
    loaded, elsewhere = plan.load(*raw), plan.elsewhere()
    tensors = [tensor for tensor in (loaded.data, loaded.scale) if tensor is not None]
    assert (loaded.data.dtype, tuple(loaded.data.shape), loaded.packing) == (plan.dtype, plan.shape, plan.packing)
    assert (None if loaded.scale is None else tuple(loaded.scale.shape)) == plan.scale
    assert sum(tensor.nbytes for tensor in tensors) == plan.nbytes
    for here, there in ((loaded.data, elsewhere.data), (loaded.scale, elsewhere.scale)):
        assert (here is None) == (there is None)
        assert here is None or there.is_meta and (here.dtype, here.shape) == (there.dtype, there.shape)
    assert elsewhere.packing == loaded.packing
    assert not plan.unchanged or loaded.data.data_ptr() == raw[0].data_ptr()
    kept = plan.unchanged or plan.packing in ("nvfp4", "mxfp8")
    copies = 0 if kept else 3 if use == "fp8_product" else 1
    joined = 0 if kept or file not in ("nvfp4", "mxfp8") else math.prod(info.form[0])
    assert plan.reading_bytes == 2 * sum(map(len, raw)) + joined + copies * 4 * math.prod(SHAPE)
    assert plan.unpacked_bytes == (2 * math.prod(SHAPE) if use == "linear" and plan.nbytes < 512 * 8 else 0)


@pytest.mark.parametrize("values, rows", [(1, 1), (700, 2), (2047, 7)])
@pytest.mark.parametrize("file, types, use", [("bf16", "e4m3", "linear"), ("Q8_0", "bf16", "other")] + [
    (file, "as in the file", "fp8_product") for file in FILES
])  # fmt: skip
def test_converting_takes_a_few_rows_at_a_time(monkeypatch, file, types, use, values, rows):
    """And gives the same bits: a whole tensor's values in float32 may be more than there is room for."""
    plan, raw = plan_storage(FILES[file], spec(types), use), raw_of(file)
    whole, before = plan.load(*raw), plan.reading_bytes
    monkeypatch.setattr(storage_plan, "PIECE", values)
    loaded = plan.load(*raw)
    assert torch.equal(loaded.data.view(torch.uint8), whole.data.view(torch.uint8))
    assert (whole.scale is None) == (loaded.scale is None) and (whole.scale is None or whole.scale.equal(loaded.scale))
    copies = 3 if use == "fp8_product" else 1
    assert plan.unchanged or before - plan.reading_bytes == copies * 4 * 256 * (8 - rows)


@pytest.mark.parametrize(
    "file, types, shape",
    [
        ("f32", "bf16", (1, 8, 256)),
        ("scaled e4m3", "bf16", (1, 8, 256)),
        ("Q8_0", "float32", (2, 4, 256)),
        ("f32", "bf16", (64, 8, 2, 2)),
    ],
)
def test_tensors_of_more_dimensions_likewise(monkeypatch, file, types, shape):
    """As Stable Diffusion 3's learnt positions, (1, n, C): 226 million values of 3.5 medium."""
    info = dataclasses.replace(FILES[file], shape=shape)
    plan, raw = plan_storage(info, spec(types), "other"), raw_of(file)
    whole, seen, convert = plan.load(*raw), [], StoragePlan._convert
    monkeypatch.setattr(storage_plan, "PIECE", 700)
    monkeypatch.setattr(StoragePlan, "_convert", lambda *a: (seen.append(convert(*a)), seen[-1])[1])
    loaded = plan.load(*raw)
    assert tuple(loaded.data.shape) == plan.shape and torch.equal(loaded.data, whole.data)
    assert len(seen) > 2 and max(piece.data.numel() for piece in seen) <= 700
    assert plan.reading_bytes <= 2 * len(raw[0]) + 4 * 700


@pytest.mark.parametrize(
    "file, types, use, dtype, scale, unchanged, rounded",
    [
        ("bf16", "as in the file", "linear", BF16, None, True, False),
        ("bf16", "bf16", "other", BF16, None, True, False),
        ("f32", "bf16", "linear", BF16, None, False, False),
        ("f32", "e4m3", "linear", E4M3, None, False, True),
        ("f32", "e4m3", "other", BF16, None, False, False),
        ("f32", "as in the file", "fp8_product", E4M3, (8, 1), False, True),
        ("f32", "e4m3", "fp8_product", E4M3, (8, 1), False, True),
        ("f32 with a scale", "as in the file", "linear", F32, None, False, False),
        ("e4m3", "bf16 or quantised", "linear", E4M3, None, True, False),
        ("e4m3", "bf16 or quantised", "fp8_product", E4M3, (8, 1), True, False),
        ("e4m3", "as in the file", "other", BF16, None, False, False),
        ("e4m3", "bf16", "linear", BF16, None, False, False),
        ("e5m2", "bf16 or quantised", "fp8_product", E4M3, (8, 1), False, True),
        ("scaled e4m3", "as in the file", "linear", E4M3, (), True, False),
        ("scaled e4m3", "as in the file", "fp8_product", E4M3, (8, 1), True, False),
        ("scaled e5m2", "bf16", "linear", BF16, None, False, False),
        ("Q8_0", "bf16 or quantised", "linear", torch.uint8, None, True, False),
        ("Q8_0", "as in the file", "other", F32, None, False, False),
        ("Q4_K", "bf16 or quantised", "fp8_product", E4M3, (8, 1), False, True),
        ("Q4_K", "bf16", "linear", BF16, None, False, False),
        ("nvfp4", "bf16 or quantised", "linear", torch.uint8, (), False, False),
        ("nvfp4", "as in the file", "fp8_product", E4M3, (8, 1), False, True),
        ("mxfp8", "as in the file", "linear", torch.uint8, None, False, False),
        ("mxfp8", "bf16", "linear", BF16, None, False, False),
        ("int8", "bf16 or quantised", "linear", torch.uint8, (), True, False),
        ("int8_rows", "as in the file", "linear", torch.uint8, (8, 1), True, False),
        ("int8_rows", "as in the file", "other", F32, None, False, False),
        ("int8_convrot", "e4m3", "linear", E4M3, None, False, True),
    ],
)
def test_the_form_of(file, types, use, dtype, scale, unchanged, rounded):
    plan = plan_storage(FILES[file], spec(types), use)
    assert (plan.dtype, plan.scale, plan.unchanged, plan.rounded_to_fp8) == (dtype, scale, unchanged, rounded)
    assert plan.linear == (use != "other")


@pytest.mark.parametrize("file", ["f32", "scaled e4m3", "Q8_0", "nvfp4", "int8_convrot"])
def test_values_are_rounded_once(file):
    """From float32 where the target is fp8; in the target's type, as ComfyUI does, where fp8 is converted."""
    info = FILES[file]
    raw = raw_of(file)
    exact = plan_storage(info, spec("as in the file"), "linear").load(*raw).dequantise()
    assert torch.equal(plan_storage(info, spec("e5m2"), "linear").load(*raw).data.float(), exact.to(E5M2).float())
    assert torch.equal(plan_storage(info, spec("bf16"), "linear").load(*raw).data, exact.bfloat16())


@pytest.mark.parametrize("packing", ["Q8_0", "Q4_K", "Q4_0"])
def test_vectors_that_are_packed(monkeypatch, packing):
    """They cannot be cut by values; Q8_0 has more bytes than values."""
    info = TensorInfo((1024,), F32, packing=packing)
    raw = torch.from_numpy(random_blocks(packing, 1, 1024, seed=1)).flatten()
    plan = plan_storage(info, spec("bf16"), "other")
    expected = Stored.in_file(raw, TensorInfo((1, 1024), F32, packing=packing)).values(BF16)
    for piece in (storage_plan.PIECE, 100):
        monkeypatch.setattr(storage_plan, "PIECE", piece)
        loaded = plan.load(raw)
        assert loaded.data.shape == (1024,) and torch.equal(loaded.data, expected[0])


def test_tensors_without_values_or_dimensions():
    for shape in ((), (0, 4), (4, 0)):
        plan = plan_storage(TensorInfo(shape, F32), spec("bf16"), "other")
        loaded = plan.load(torch.zeros(4 if shape == () else 0, dtype=torch.uint8))
        assert loaded.data.shape == shape and loaded.data.dtype == BF16
