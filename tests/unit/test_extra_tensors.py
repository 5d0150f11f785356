"""What no weight needs is left alone, whatever it is; and the prefixes that ComfyUI takes off are taken off."""

import json
import logging
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from formats import FORMATS, MINI, add_raw, retype_gguf, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import SMALL_CHROMA, SMALL_QWEN, SMALL_SD3, SMALL_Z_IMAGE, load_model, spec_of

from fastusp_backend.errors import CheckpointError
from fastusp_backend.models.files import read_model
from fastusp_backend.models.placement import place_file
from fastusp_backend.models.synthetic import TINY_FLUX2, write_checkpoint
from fastusp_backend.weights.contents import own_prefix
from fastusp_backend.weights.dtypes import main_dtype

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
LAYER = "single_blocks.0.linear1"
EXTRAS = {
    "position_ids": torch.arange(77),
    "mask": torch.ones(3, dtype=torch.bool),
    "spiece_model": torch.zeros(9, dtype=torch.uint8),
    "double_blocks.0.extra": torch.ones(2),
    "double_blocks.7.extra": torch.ones(2),
    "double_blocks.9.img_mlp.0.bias": torch.ones(4),  # a block's name, but no block
    "single_blocks.last.extra": torch.ones(2),
    "guidance_in.extra": torch.ones(2),
    "img_in.extra.weight": torch.ones(2, 2).half(),
    "lora_unet_x.lora_down.weight": torch.ones(2, 2),
    "model_ema.decay": torch.tensor(0.99),
    "vae.encoder.conv_in.weight": torch.zeros(4, 3, 3, 3),
    "vae.decoder.conv_in.qweight": torch.zeros(4, dtype=torch.int32),
    "vae.decoder.conv_in.comfy_quant": torch.tensor([123], dtype=torch.uint8),
    "vae.decoder.conv_out.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn),
    "vae.decoder.conv_out.scale_weight": torch.ones(4),
    "first_stage_model.decoder.conv_in.weight": torch.zeros(4, 3),
    "text_model.embeddings.position_ids": torch.arange(77)[None],
    "input_blocks.0.0.weight": torch.zeros(2, 2),
    "controlnet_blocks.0.weight": torch.zeros(2, 2),
}


def same_model(path, reference) -> None:
    """That a file gives the weights that a plain one has, bit for bit."""
    ours, theirs = (dict(load_model(spec_of(p), CPU).named_parameters()) for p in (path, reference))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", EXTRAS)
def test_one_more_tensor_changes_nothing(mini, tmp_path, name):
    path = tmp_path / "x.safetensors"
    save_file(load_file(mini) | {name: EXTRAS[name]}, path)
    file, plain = read_model(str(path)), read_model(str(mini))
    assert file.ignored == (name,) and file.config == plain.config
    assert file.header.keys() == plain.header.keys()
    same_model(path, mini)


def test_extra_tensors_are_counted_nowhere(mini, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(load_file(mini) | EXTRAS | {"huge": torch.zeros(9_000_000, dtype=torch.bfloat16)}, path)
    file, plain = read_model(str(path)), read_model(str(mini))
    assert main_dtype(file.header) == torch.float32
    sizes = [place_file(f.header, f.spec(storage=None, compute="float32"), 2).device_bytes for f in (file, plain)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", ["plain", "scaled_old", "scaled_tensors", "scaled_metadata"])
def test_what_the_metadata_says_of_other_layers_does_not_matter(mini, tmp_path, name):
    """Whether the file has them, as in an all-in-one one, or not."""
    plain, path = (mini if name == "plain" else tmp_path / "plain.safetensors"), tmp_path / "x.safetensors"
    if name != "plain":
        write(name, mini, plain)
    with safe_open(plain, "pt") as file:
        told = json.loads((file.metadata() or {}).get("_quantization_metadata", '{"layers": {}}'))
    others = ("vae.decoder.conv_in", "text_encoder.layers.0", "double_blocks.0.extra", f"{LAYER}.extra", "img_in.x")
    told["layers"] |= dict(zip(others, ({"format": "nvfp4"}, {"format": 7}, {}, 7, None), strict=True))
    extra = {f"{layer}.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn) for layer in others[::2]}
    save_file(load_file(plain) | extra, path, {"_quantization_metadata": json.dumps(told)})
    same_model(path, plain)


@pytest.mark.parametrize("kind", ["F4", "F6_E3M2", "C64", "U16", "F8_E4M3FNUZ", "something new"])
def test_types_that_nobody_knows_do_not_matter(mini, tmp_path, kind):
    path = tmp_path / "x.safetensors"
    path.write_bytes(mini.read_bytes())
    add_raw(path, {"extra": (kind, (3, 5), bytes(7)), f"{LAYER}.extra": (kind, (), b"")})
    assert read_model(str(path)).ignored == ("extra", f"{LAYER}.extra")
    same_model(path, mini)


@pytest.mark.parametrize("number", [20, 24, 27, 31, 4242])
def test_types_that_gguf_does_not_know_do_not_matter(mini, tmp_path, monkeypatch, number):
    """The formats' own tests have files without this tensor."""
    path, plain = tmp_path / "x.gguf", tmp_path / "plain.gguf"
    write("gguf_Q8_0", mini, plain)
    add = gguf.GGUFWriter.write_header_to_file

    def with_extra(writer):
        writer.add_tensor("extra.weight", np.zeros(96, np.float32))
        writer.add_array("tokens", ["a", "b"])
        writer.add_array("numbers", [1, 2, 3])
        add(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_extra)
    write("gguf_Q8_0", mini, path)
    retype_gguf(path, "extra.weight", number)
    assert read_model(str(path)).ignored == ("extra.weight",)
    same_model(path, plain)


def test_what_is_ignored_is_logged_in_one_line(mini, tmp_path, caplog):
    path = tmp_path / "x.safetensors"
    save_file(load_file(mini) | EXTRAS, path)
    with caplog.at_level(logging.INFO):
        read_model(str(mini)).log_ignored()
        assert not caplog.records
        read_model(str(path)).log_ignored()
    (record,) = caplog.records
    text = record.getMessage()
    assert str(path) in text and f"{len(EXTRAS)} tensors that FLUX.1 does not use" in text
    assert sum(repr(name) in text for name in EXTRAS) == 3 and text.endswith(f"and {len(EXTRAS) - 3} more")


@pytest.mark.parametrize("name", FORMATS)
def test_the_formats_have_nothing_to_ignore(mini, tmp_path, name):
    """Scales, marks and the other models of an all-in-one file are not worth a line."""
    write(name, mini, tmp_path / name)
    assert read_model(str(tmp_path / name)).ignored == ()


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "model.model.", "net.", "model."])
@pytest.mark.parametrize("family", ["FLUX.1", "FLUX.2", "Chroma", "Qwen-Image", "Stable Diffusion 3", "Z-Image"])
def test_prefixes_are_taken_off(mini, tmp_path, prefix, family):
    plain, path = tmp_path / "plain.safetensors", tmp_path / "x.safetensors"
    if family == "FLUX.2":
        write_checkpoint(
            str(plain), replace(TINY_FLUX2, hidden=128, heads=1, mlp=256, double_blocks=1, single_blocks=1)
        )
    elif family == "Qwen-Image":
        small = replace(SMALL_QWEN, hidden=128, heads=1, mlp=256, blocks=1, reference_method="index_timestep_zero")
        write_checkpoint(str(plain), small)
    elif family == "Chroma":
        write_checkpoint(str(plain), replace(SMALL_CHROMA, hidden=128, heads=1, mlp=256))
    elif family == "Stable Diffusion 3":
        write_checkpoint(str(plain), replace(SMALL_SD3, hidden=64, heads=1, mlp=256, blocks=2, second_attentions=1))
    elif family == "Z-Image":
        write_checkpoint(str(plain), replace(SMALL_Z_IMAGE, hidden=128, heads=1, mlp=256, blocks=1))
    else:
        plain.write_bytes(mini.read_bytes())
    others = {"vae.encoder.x": torch.ones(2), "first_stage_model.x": torch.ones(2, dtype=torch.int64)}
    save_file({prefix + name: tensor for name, tensor in load_file(plain).items()} | others, path)
    assert read_model(str(path)).config.family == family
    same_model(path, plain)


@pytest.mark.parametrize(
    "prefix, name, inner",
    [
        pytest.param(prefix, name, inner, marks=pytest.mark.thorough if (n + number + inner) % 2 else ())
        for n, prefix in enumerate(("", "model.diffusion_model.", "model.model.", "net.", "model."))
        for number, name in enumerate(("scaled_old", "scaled_metadata", "scaled_tensors"))
        for inner in (True, False)
    ],
)
def test_scales_follow_the_prefix(mini, tmp_path, prefix, name, inner):
    """ComfyUI takes the marks, which name the file or its layers, with the prefix and without."""
    plain, path, metadata = tmp_path / "plain.safetensors", tmp_path / "x.safetensors", {}
    write(name, mini, plain)
    state = {prefix + key: tensor for key, tensor in load_file(plain).items()}
    mark = prefix if inner else ""
    if name == "scaled_old":
        state[f"{mark}scaled_fp8"] = state.pop(f"{prefix}scaled_fp8")
    if name == "scaled_metadata":
        layers = {key.removesuffix(".weight_scale") for key in load_file(plain) if key.endswith(".weight_scale")}
        formats = {mark + layer: {"format": "float8_e4m3fn"} for layer in layers} | {"vae.x": {"format": "nvfp4"}}
        metadata["_quantization_metadata"] = json.dumps({"layers": formats})
    save_file(state, path, metadata)
    same_model(path, plain)
    scales = [info.scale for info in read_model(str(path)).header.values() if info.scale is not None]
    assert len(scales) == 13 and scales == [i.scale for i in read_model(str(plain)).header.values() if i.scale]


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "net."])
def test_gguf_follows_the_prefix(mini, tmp_path, prefix):
    plain, path = tmp_path / "plain.gguf", tmp_path / "x.gguf"
    write("gguf_Q4_K", mini, plain)
    prefixed = tmp_path / "prefixed.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(mini).items()}, prefixed)
    write("gguf_Q4_K", prefixed, path)
    same_model(path, plain)


def names(*groups: tuple[str, int]) -> list[str]:
    """Of each (prefix, count): as many names, the marks of a model among them."""
    return [prefix + name for prefix, count in groups for name in ["a", "b", *map(str, range(count - 2))]]


@pytest.mark.parametrize(
    "expected, groups",
    [
        ("", [("", 9)]),
        ("", [("", 9), ("net.", 5)]),
        ("net.", [("", 9), ("net.", 6)]),
        ("model.", [("", 9), ("model.", 2)]),
        ("model.", [("net.", 5), ("model.", 9)]),
        ("net.", [("net.", 9), ("model.model.", 8), ("model.diffusion_model.", 8)]),
        ("model.diffusion_model.", [("net.", 9), ("model.model.", 9), ("model.diffusion_model.", 9)]),
    ],
)
def test_the_transformer_is_where_comfyui_sees_it(expected, groups):
    """Its rule, and its order, for files with more than one."""
    marks = (frozenset(("z",)), frozenset(("a", "b")))
    assert own_prefix(names(*groups), marks) == expected


@pytest.mark.parametrize("prefix", ["net.", "model.", "model.model.", "model.diffusion_model."])
def test_other_tensors_under_a_prefix_hide_no_transformer(mini, tmp_path, prefix):
    path, extra = tmp_path / "x.safetensors", {f"{prefix}layers.{i}.weight": torch.ones(2) for i in range(400)}
    save_file(load_file(mini) | extra, path)
    assert len(read_model(str(path)).ignored) == 400
    same_model(path, mini)


def test_extra_tensors_do_not_make_up_for_a_missing_one(mini, tmp_path):
    path, state = tmp_path / "x.safetensors", load_file(mini)
    del state[f"{LAYER}.bias"]
    save_file(state | {name: tensor for name, tensor in EXTRAS.items() if "controlnet" not in name}, path)
    with pytest.raises(CheckpointError, match=f"without 1 of its {len(state) + 1} tensors: '{LAYER}.bias'$"):
        read_model(str(path))


def test_leftovers_of_guidance_do_not_make_schnell(mini, tmp_path):
    """ComfyUI would take the file for one without guidance, and give other images."""
    path, state = tmp_path / "x.safetensors", load_file(mini)
    assert MINI.guidance
    del state["guidance_in.in_layer.weight"]
    save_file(state, path)
    with pytest.raises(CheckpointError, match="tensors: 'guidance_in.in_layer.weight'"):
        read_model(str(path))
