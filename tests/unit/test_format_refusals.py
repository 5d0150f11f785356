"""Files in other formats, and broken ones, are refused by name."""

import json

import pytest
import torch
from formats import FORMATS, PREFIX, add_raw, packed_layers, retype_gguf, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import load_model, spec_of

from fastusp_backend.errors import CheckpointError

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
LAYER = "single_blocks.0.linear1"


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as refused:
        load_model(spec_of(path), CPU)
    assert str(path) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("kind", ["asym_w4a8_int8", "mxfp4"])
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
    assert text.startswith("Use a file in another format: ") and f"quantised as {kind}" in text
    assert LAYER in text and "int8 and GGUF" in text


@pytest.mark.parametrize(
    "extra, words",
    [
        ({f"{LAYER}.weight.quant_state.bitsandbytes__nf4": torch.zeros(4)}, "bitsandbytes NF4"),
        ({f"{LAYER}.qweight": torch.zeros(4), f"{LAYER}.wscales": torch.zeros(4)}, "SVDQuant"),
        ({f"{LAYER}.qweight": torch.zeros(4), f"{LAYER}.qzeros": torch.zeros(4)}, "GPTQ or AWQ"),
        ({f"{LAYER}.qweight": torch.zeros(4), f"{LAYER}.weight": None}, "GPTQ or AWQ"),
        ({f"{LAYER}.weight": torch.zeros(2, dtype=torch.int8)}, "quantised as int8"),
        (
            {
                f"{LAYER}.weight": torch.zeros(9, 1, dtype=torch.uint8),
                f"{LAYER}.weight.quant_map": torch.zeros(16),
                "img_in.weight": torch.zeros(9, 1, dtype=torch.uint8),
            },
            "quantised as bitsandbytes",
        ),
    ],
)
def test_other_tools_are_refused_by_name(mini, tmp_path, extra, words):
    state = {name: tensor for name, tensor in (load_file(mini) | extra).items() if tensor is not None}
    save_file(state, tmp_path / "x.safetensors")
    assert words in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.update({f"{LAYER}.weight_scale": torch.ones(4, 1)}), "more than one scale per tensor"),
        (lambda s: s.pop(f"{LAYER}.weight_scale"), f"without tensor '{LAYER}.weight_scale'"),
        (lambda s: s.update({f"{LAYER}.weight": s[f"{LAYER}.weight"].float()}), "its weight is torch.float32"),
        (lambda s: s.update({f"{LAYER}.comfy_quant": torch.tensor([123], dtype=torch.uint8)}), "malformed"),
        (
            lambda s: s.update({f"{LAYER}.pre_quant_scale": torch.ones(2)}),
            "quantised as something with a 'pre_quant_scale'",
        ),
    ],
)
def test_broken_scaled_files_are_refused(mini, tmp_path, change, words):
    path = tmp_path / "x.safetensors"
    write("scaled_tensors", mini, path)
    state = load_file(path)
    change(state)
    save_file(state, path)
    assert words in refusal(path)


@pytest.mark.parametrize(
    "name, leaf, value, words",
    [
        ("nvfp4", "weight_scale", None, "an incomplete nvfp4 file, without tensor '{leaf}'"),
        ("nvfp4", "weight_scale_2", None, "an incomplete nvfp4 file, without tensor '{leaf}'"),
        ("nvfp4", "weight_scale_2", torch.ones(2), "quantised as nvfp4 with more than one scale per tensor, (2,),"),
        ("nvfp4", "weight_scale_2", torch.tensor(0.0), "its scale '{leaf}' is 0.0"),
        ("nvfp4", "weight_scale", torch.ones(1280, 16), "nvfp4 with scales of type float32"),
        ("nvfp4", "weight_scale", torch.ones(1280, 4, dtype=torch.uint8), "nvfp4 with scales (1280, 4), where 20480"),
        ("nvfp4", "weight", torch.zeros(1280, 100, dtype=torch.uint8), "has 200 columns, where its format nvfp4 has"),
        ("nvfp4", "weight", torch.zeros(1280, 256), "is said to be nvfp4, but its weight is torch.float32 (1280, 256)"),
        ("nvfp4", "weight", torch.zeros(1280, dtype=torch.uint8), "its weight is torch.uint8 (1280,)"),
        ("nvfp4", "pre_quant_scale", torch.ones(256), "quantised as something with a 'pre_quant_scale'"),
        ("nvfp4", "comfy_quant", None, "says what these bytes mean"),
        ("mxfp8", "weight_scale", None, "an incomplete mxfp8 file, without tensor '{leaf}'"),
        ("mxfp8", "weight_scale_2", torch.tensor(1.0), "quantised as something with a 'weight_scale_2'"),
        ("int4_convrot", "weight_scale", None, "an incomplete convrot_w4a4 file, without tensor '{leaf}'"),
        ("int4_convrot", "weight", torch.zeros(1280, 96, dtype=torch.int8), "has 192 columns, where its format int4_"),
        ("int8_rows", "weight_scale", None, "an incomplete int8_tensorwise file, without tensor '{leaf}'"),
        (
            "int8_rows",
            "weight_scale",
            torch.ones(1279),
            "int8_tensorwise with scales (1279,), where 1280 were expected",
        ),
        ("int8_rows", "weight_scale", torch.ones(1280, dtype=torch.int32), "scales of type int32"),
        ("int8_rows", "weight_scale", torch.tensor(float("inf")), "its scale '{leaf}' is inf"),
        ("int8_rows", "weight", torch.zeros(1280, 256, dtype=torch.uint8), "its weight is torch.uint8 (1280, 256)"),
    ],
)
def test_broken_packed_layers_are_refused(mini, tmp_path, name, leaf, value, words):
    path, leaf = tmp_path / "x.safetensors", f"{LAYER}.{leaf}"
    FORMATS[name](load_file(mini), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path) | {leaf: value}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path, metadata)
    assert words.format(leaf=leaf) in refusal(path)


@pytest.mark.parametrize("said", [{"convrot_groupsize": 128}, {"convrot_groupsize": "x" * 500}])
def test_rotations_of_other_groups_are_refused(mini, tmp_path, said):
    path = tmp_path / "x.safetensors"
    packed_layers(load_file(mini), path, "int8_convrot", **said)
    text = refusal(path)
    assert f"int8_tensorwise with convrot in groups of {said['convrot_groupsize']}"[:100] in text and len(text) < 500


@pytest.mark.parametrize("number, kind", [(20, "IQ4_NL"), (39, "MXFP4"), (26, "I32"), (4242, "type 4242")])
def test_other_gguf_formats_are_refused_by_name(mini, tmp_path, number, kind):
    path = tmp_path / "x.gguf"
    write("gguf_Q8_0", mini, path)
    retype_gguf(path, f"{LAYER}.weight", number)
    text = refusal(path)
    assert f"quantised as GGUF {kind} ('{LAYER}.weight')" in text and "int8 and GGUF" in text


@pytest.mark.parametrize("kind", ["U16", "U32", "F4", "F6_E2M3", "C64", "I64", "BOOL"])
def test_a_needed_weight_of_another_type_is_refused_by_it(mini, tmp_path, kind):
    path, state = tmp_path / "x.safetensors", load_file(mini)
    weight = state.pop(f"{LAYER}.weight")
    save_file(state, path)
    size = {"BOOL": 1, "I64": 8}.get(kind, 4)
    add_raw(path, {f"{LAYER}.weight": (kind, tuple(weight.shape), bytes(weight.numel() * size))})
    text = refusal(path)
    assert f"quantised as {dict(BOOL='bool', I64='int64').get(kind, kind)} ('{LAYER}.weight')" in text


@pytest.mark.parametrize(
    "name, leaf, words",
    [
        ("scaled_old", "scaled_fp8", "'scaled_fp8', which marks such files, is missing"),
        ("scaled_tensors", "comfy_quant", ".comfy_quant', or _quantization_metadata in its header"),
        ("scaled_metadata", "__metadata__", "or _quantization_metadata in its header"),
    ],
)
def test_scales_without_their_mark_are_refused(mini, tmp_path, name, leaf, words):
    """Without its scale a weight would mean something else."""
    path = tmp_path / "x.safetensors"
    write(name, mini, path)
    save_file({key: tensor for key, tensor in load_file(path).items() if not key.endswith(leaf)}, path)
    text = refusal(path)
    assert words in text and "add the mark to" in text and "is the scale of a weight" in text


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_bytes_without_a_mark_are_refused(mini, tmp_path, dtype):
    path, state = tmp_path / "x.safetensors", load_file(mini)
    save_file(state | {f"{LAYER}.weight": state[f"{LAYER}.weight"].to(dtype)}, path)
    text = refusal(path)
    assert f"quantised as {str(dtype)[6:]} ('{LAYER}.weight')" in text
    assert f"neither a tensor '{LAYER}.comfy_quant' nor _quantization_metadata" in text


@pytest.mark.parametrize("kept", [4, 30, 0.05, 0.5, -1], ids=str)
def test_truncated_gguf_files_are_refused(mini, tmp_path, kept):
    path = tmp_path / "x.gguf"
    write("gguf_Q8_0", mini, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)] if isinstance(kept, float) else data[:kept])
    text = refusal(path)
    assert text.startswith(f"Download {path} again") and "truncated" in text


def test_pickles_are_refused(mini, tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save(load_file(mini), path)
    assert refusal(path).startswith(f"Convert {path} to safetensors: it is a PyTorch pickle")


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
@pytest.mark.parametrize(
    "text, words",
    [
        ("<!DOCTYPE html><html lang='en'>", "is a web page, not a model"),
        ("\ufeff\n  <HTML><head>", "is a web page, not a model"),
        ("<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 23802932552\n", "Run git lfs pull in"),
    ],
)
def test_what_was_downloaded_in_a_models_place_is_named(tmp_path, suffix, text, words):
    path = tmp_path / f"x.{suffix}"
    path.write_text(text)
    told = refusal(path)
    assert str(path) in told and words in told and "truncated" not in told


def test_a_header_whose_length_begins_like_a_web_page(mini, tmp_path):
    """In bytes: b"<a" and zeros."""
    path, data = tmp_path / "x.safetensors", mini.read_bytes()
    size = int.from_bytes(data[:8], "little")
    wide = int.from_bytes(b"<a", "little")
    assert size < wide
    path.write_bytes(wide.to_bytes(8, "little") + data[8 : 8 + size].ljust(wide) + data[8 + size :])
    assert load_model(spec_of(path), CPU)


def test_a_truncated_file_names_the_tensor(mini, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(mini.read_bytes()[:-10])
    text = refusal(path)
    assert text.startswith(f"Download {path} again. It is truncated: tensor '") and text.endswith(
        f"the file at byte {path.stat().st_size}"
    )
