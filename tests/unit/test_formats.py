"""fp8, scaled fp8, all-in-one and GGUF files: kept as they are in memory, computed as their values say."""

import json
from dataclasses import replace

import gguf
import msgspec
import numpy as np
import pytest
import torch
from formats import FORMATS, HALVES, PREFIX, random_blocks, write
from safetensors.torch import load_file, save_file
from support import SMALL, OneRank, inputs, load_model, randn, spec_of

from fastusp_backend.config import ModelSpec, Settings
from fastusp_backend.engine.loading import Checkpoint
from fastusp_backend.errors import CheckpointError
from fastusp_backend.models.family import Conditioning
from fastusp_backend.models.layers import Linear
from fastusp_backend.models.synthetic import write_flux
from fastusp_backend.weights import packing
from fastusp_backend.weights.checkpoint import choose_types, main_dtype, read_header
from fastusp_backend.weights.headers import FP8
from fastusp_backend.weights.stored import Stored

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
MINI = replace(SMALL, hidden=256, heads=2, mlp=512, double_blocks=1, single_blocks=1, context=256, pooled=256)
KEPT = {"fp8_": 1, "scal": 1, "gguf": 1, "all_": 4}
"""Bytes a value of a block's matrices at most, by the beginning of the format's name."""


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    path = tmp_path_factory.mktemp("formats") / "mini.safetensors"
    write_flux(str(path), MINI, seed=1)
    return path


def linears(model) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def evaluate(model, linear: str = "exact") -> torch.Tensor:
    denoiser = OneRank(model, Settings(linear=linear))
    given = inputs(MINI, text=5, size=(6, 4))
    return denoiser(given.x, given.timestep, Conditioning(given.context, given.y, given.guidance)).clone()


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_means_what_its_plain_file_means(mini, tmp_path, name):
    path, plain = tmp_path / name, tmp_path / "plain.safetensors"
    values = write(name, mini, path)
    save_file(values, plain)
    model = load_model(spec_of(path), CPU)
    for layer, linear in linears(model).items():
        expected = values[model.file_key(f"{layer}.weight")]
        assert torch.equal(linear.stored.dequantise(), expected), layer
        weight, bias = linear.rows(slice(3, 9), torch.float32)
        assert torch.equal(weight, expected[3:9])
        assert torch.equal(bias, values[model.file_key(f"{layer}.bias")][3:9])
        if "blocks" in layer:
            assert linear.weight.nbytes <= expected.numel() * KEPT[name[:4]] * 1.1
    assert torch.equal(evaluate(model), evaluate(load_model(spec_of(plain), CPU)))


@pytest.mark.parametrize("name", ["scaled_old", "gguf_Q4_K", "fp8_e5m2"])
def test_bfloat16_values_are_rounded_as_comfyui_rounds_them(mini, tmp_path, name):
    values = write(name, mini, tmp_path / name)
    linear = load_model(spec_of(tmp_path / name), CPU).single_blocks[0].linear1
    weight, _ = linear.rows(slice(None), torch.bfloat16)
    if linear.scale is None:
        assert torch.equal(weight, values["single_blocks.0.linear1.weight"].bfloat16())
    else:
        assert torch.equal(weight, linear.weight.to(torch.bfloat16) * linear.scale.to(torch.bfloat16))


@pytest.mark.parametrize("linear", ["exact", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_scale_of_a_weight_that_is_not_fp8_is_multiplied_in(mini, tmp_path, dtype, linear):
    """As some old scaled files have them; and using a weight never changes it."""
    path, plain, weight = tmp_path / "x.safetensors", tmp_path / "plain.safetensors", f"{LAYER}.weight"
    values = write("scaled_old", mini, path)
    state = load_file(path)
    original = load_file(mini)[weight].to(dtype)
    save_file(state | {weight: original, f"{LAYER}.scale_weight": torch.tensor(0.5)}, path)
    save_file(values | {weight: original.float() / 2}, plain)
    model = load_model(msgspec.structs.replace(spec_of(path), linear=linear), CPU)
    first = evaluate(model, linear)
    assert torch.equal(evaluate(model, linear), first)
    if linear == "exact":
        assert torch.equal(first, evaluate(load_model(spec_of(plain), CPU)))
        assert model.get_submodule(LAYER).weight.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.full((4, 1), 0.5)], ids=["tensor", "rows"])
def test_scaled_values_are_never_the_stored_ones(dtype, scale):
    stored = Stored(torch.ones(4, 4, dtype=dtype), scale)
    for _ in range(2):
        assert stored.values(dtype).eq(0.5).all() and stored.values(dtype, slice(2), slice(1, 3)).eq(0.5).all()
        assert stored.dequantise().eq(0.5).all()
    assert stored.data.eq(1).all()


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "scaled_metadata", "gguf_Q8_0"])
@pytest.mark.parametrize("keep", [True, False])
def test_storage_of_what_is_quantised(mini, tmp_path, name, keep):
    """keep_quantised: GPUs' default, where the other tensors take the type of computation."""
    values = write(name, mini, tmp_path / name)
    spec = ModelSpec.of_file(str(tmp_path / name), storage="bfloat16", compute="bfloat16", keep_quantised=keep)
    model = load_model(spec, CPU)
    block = model.single_blocks[0]
    assert (block.linear1.weight.dtype == torch.bfloat16) != keep
    assert block.norm.key_norm.scale.dtype == block.linear1.bias.dtype == torch.bfloat16
    if not keep and name != "scaled_metadata":
        assert torch.equal(block.linear1.weight, values["single_blocks.0.linear1.weight"].bfloat16())
    if name == "gguf_Q8_0":
        assert model.img_in.weight.dtype == torch.bfloat16
    assert (block.linear1.packing == "Q8_0") == (keep and name == "gguf_Q8_0")


@pytest.mark.parametrize("storage", ["float8_e4m3fn", "float8_e5m2"])
def test_a_plain_file_stored_in_fp8(mini, tmp_path, storage):
    model = load_model(ModelSpec.of_file(str(mini), storage=storage, compute="float32"), CPU)
    dtype, tensors = getattr(torch, storage), load_file(mini)
    for name, parameter in model.named_parameters():
        expected = tensors[model.file_key(name)].to(dtype)
        assert torch.equal(parameter.float(), expected.float())
        assert parameter.dtype == (dtype if expected.dim() == 2 else torch.bfloat16)


@pytest.mark.parametrize("name", HALVES)
def test_unpacking_is_the_reference_bit_by_bit(name, monkeypatch):
    monkeypatch.setattr(packing, "PIECE", 512)
    data = random_blocks(name, 7, 512, seed=3)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    assert 0.5 < expected.std() * 512**0.5 < 2 and abs(expected.mean()) < 0.02
    for dtype in (torch.float32, torch.bfloat16):
        got = packing.unpack(torch.from_numpy(data), name, dtype)
        assert torch.equal(got, torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("name", ["Q5_0", "Q4_K"])
@pytest.mark.parametrize("columns", [slice(256, 512), slice(None, 256), slice(100, 300), slice(None)])
def test_only_the_blocks_of_the_columns_are_unpacked(name, columns, monkeypatch):
    unpacked = []
    function = packing.PACKINGS[name][2]
    counted = (*packing.PACKINGS[name][:2], lambda blocks: unpacked.append(function(blocks)) or unpacked[-1])
    monkeypatch.setitem(packing.PACKINGS, name, counted)
    low_rank = randn(7, 2, seed=1), randn(2, 512, seed=2)
    stored = Stored(torch.from_numpy(random_blocks(name, 7, 512, seed=3)), None, name, low_rank)
    want = stored.values(torch.float32)[2:5, columns]
    unpacked.clear()
    torch.testing.assert_close(stored.values(torch.float32, slice(2, 5), columns), want)
    count = 512 if columns.start == 100 else want.shape[1]
    assert sum(t.numel() for t in unpacked) == 3 * count


def test_all_formats_are_tested():
    assert HALVES.keys() == packing.PACKINGS.keys()


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("scaled", [True, False])
def test_storing_in_fp8_in_place(dtype, scaled):
    values = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    stored = Stored(torch.zeros(64, 32, dtype=dtype), torch.tensor(3.0) if scaled else None)
    addresses = stored.data.data_ptr(), scaled and stored.scale.data_ptr()
    stored.store(values)
    assert (stored.data.data_ptr(), scaled and stored.scale.data_ptr()) == addresses
    scale = stored.scale if scaled else 1.0
    spacing = torch.finfo(dtype).eps * values.abs().clamp(min=torch.finfo(dtype).tiny * scale)
    assert ((stored.dequantise() - values).abs() <= spacing / 2 * 1.01).all()
    stored.store(values * 1e6)
    assert stored.dequantise().isfinite().all()
    stored.store(torch.zeros(64, 32))
    assert not stored.dequantise().any()


def test_storing_in_other_types():
    stored = Stored(torch.zeros(2, 2, dtype=torch.bfloat16))
    values = stored.dequantise()
    values += 1 / 3
    assert not stored.data.any()
    stored.store(values)
    assert torch.equal(stored.data, values.bfloat16())
    plain = Stored(torch.zeros(2))
    assert plain.dequantise().data_ptr() != plain.data.data_ptr()


@pytest.mark.parametrize("name", ["scaled_tensors", "gguf_Q4_K", "all_in_one"])
def test_what_was_changed_is_read_again(mini, tmp_path, name):
    write(name, mini, tmp_path / name)
    checkpoint = Checkpoint(spec_of(tmp_path / name))
    checkpoint.allocate(CPU)
    linear = checkpoint.read().single_blocks[0].linear1
    before, scale = linear.weight.clone(), linear.scale
    linear.weight.view(torch.uint8).fill_(1)
    ((_, again),) = checkpoint.reread(["single_blocks.0.linear1.weight"])
    assert torch.equal(again.data.view(torch.uint8), before.view(torch.uint8)) and again.scale == scale
    assert again.packing == linear.packing


def test_the_main_type(mini, tmp_path):
    for name, dtype in (("fp8_e5m2", torch.float8_e5m2), ("gguf_Q8_0", torch.float32), ("all_in_one", torch.float32)):
        write(name, mini, tmp_path / name)
        assert main_dtype(read_header(str(tmp_path / name))) == dtype


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


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as refused:
        load_model(spec_of(path), CPU)
    assert str(path) in str(refused.value)
    return str(refused.value)


LAYER = "single_blocks.0.linear1"


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8", "int8_tensorwise", "convrot_w4a4"])
@pytest.mark.parametrize("where", ["metadata", "prefixed metadata", "tensor"])
def test_other_formats_are_refused_by_name(mini, tmp_path, kind, where):
    path, state, metadata = tmp_path / "x.safetensors", load_file(mini), {}
    if where == "tensor":
        state[f"{LAYER}.comfy_quant"] = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    else:
        prefix = PREFIX if where.startswith("prefixed") else ""
        state = {prefix + name: tensor for name, tensor in state.items()}
        metadata["_quantization_metadata"] = json.dumps({"layers": {f"{prefix}{LAYER}": {"format": kind}}})
    save_file(state, path, metadata)
    text = refusal(path)
    assert f"quantised as {kind}" in text and LAYER in text and "scaled fp8 and GGUF" in text


@pytest.mark.parametrize(
    "extra, words",
    [
        ({f"{LAYER}.weight.quant_state.bitsandbytes__nf4": torch.zeros(4)}, "bitsandbytes NF4"),
        ({f"{LAYER}.qweight": torch.zeros(4), f"{LAYER}.wscales": torch.zeros(4)}, "SVDQuant"),
        ({f"{LAYER}.qweight": torch.zeros(4), f"{LAYER}.qzeros": torch.zeros(4)}, "GPTQ or AWQ"),
        ({f"{LAYER}.weight": torch.zeros(2, dtype=torch.int8)}, "quantised as int8"),
    ],
)
def test_other_tools_are_refused_by_name(mini, tmp_path, extra, words):
    save_file(load_file(mini) | extra, tmp_path / "x.safetensors")
    assert words in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.update({f"{LAYER}.weight_scale": torch.ones(4, 1)}), "more than one scale per tensor"),
        (lambda s: s.pop(f"{LAYER}.weight_scale"), f"tensor '{LAYER}.weight_scale' is missing"),
        (lambda s: s.update({f"{LAYER}.weight": s[f"{LAYER}.weight"].float()}), "its weight is torch.float32"),
        (lambda s: s.update({f"{LAYER}.comfy_quant": torch.tensor([123], dtype=torch.uint8)}), "malformed"),
        (lambda s: s.update({f"{LAYER}.pre_quant_scale": torch.ones(2)}), "pre_quant_scale' is unknown"),
    ],
)
def test_broken_scaled_files_are_refused(mini, tmp_path, change, words):
    path = tmp_path / "x.safetensors"
    write("scaled_tensors", mini, path)
    state = load_file(path)
    change(state)
    save_file(state, path)
    assert words in refusal(path)


@pytest.mark.parametrize("kind", ["IQ4_NL", "MXFP4"])
def test_other_gguf_formats_are_refused_by_name(tmp_path, kind):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    writer.add_tensor(f"{LAYER}.weight", np.zeros((4, size), np.uint8), raw_dtype=gguf.GGMLQuantizationType[kind])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    text = refusal(path)
    assert f"GGUF {kind}" in text and "Q4_K" in text


@pytest.mark.parametrize("kept", [4, 30, 0.05, 0.5, -1], ids=str)
def test_truncated_gguf_files_are_refused(mini, tmp_path, kept):
    path = tmp_path / "x.gguf"
    write("gguf_Q8_0", mini, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)] if isinstance(kept, float) else data[:kept])
    text = refusal(path)
    assert "truncated" in text and "Download it again" in text


def test_pickles_are_refused(mini, tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save(load_file(mini), path)
    assert "PyTorch pickle" in refusal(path)


def test_a_truncated_file_names_the_tensor(mini, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(mini.read_bytes()[:-10])
    text = refusal(path)
    assert "is truncated: tensor '" in text and text.endswith(
        f"the file at byte {path.stat().st_size}. Download it again"
    )


def test_tensors_may_begin_anywhere(tmp_path, mini):
    """Old writers did not align the header."""
    state, path = load_file(mini), tmp_path / "odd.safetensors"
    data = mini.read_bytes()
    size = int.from_bytes(data[:8], "little")
    path.write_bytes((size + 1).to_bytes(8, "little") + data[8 : 8 + size] + b" " + data[8 + size :])
    model = load_model(spec_of(path), CPU)
    assert all(torch.equal(p, state[model.file_key(name)]) for name, p in model.named_parameters())
