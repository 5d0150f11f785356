"""FLUX.1 files of any size are recognised and read; every other file is refused by name."""

import errno
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import SMALL, load_model, spec_of

from fastusp_backend.config import ModelSpec
from fastusp_backend.errors import CheckpointError
from fastusp_backend.models.detection import detect
from fastusp_backend.models.files import read_model
from fastusp_backend.models.synthetic import FLUX_DEV, write_checkpoint
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
MINI = replace(SMALL, hidden=128, heads=1, mlp=256, double_blocks=1, single_blocks=1)


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    path = tmp_path_factory.mktemp("mini") / "mini.safetensors"
    write_checkpoint(str(path), MINI, seed=1)
    return path


@pytest.fixture
def changed(mini, tmp_path):
    """changed(drop=, add=): the mini file with other tensors, as a path."""

    def write(drop=(), add=None):
        tensors = {name: t for name, t in load_file(mini).items() if name not in drop} | (add or {})
        path = tmp_path / "changed.safetensors"
        save_file(tensors, path)
        return path

    return write


def refusal(path, spec: ModelSpec | None = None) -> str:
    with pytest.raises(CheckpointError) as refused:
        load_model(spec or spec_of(path), CPU)
    assert str(path) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        MINI,
        replace(MINI, guidance=False),
        replace(MINI, hidden=384, heads=3, mlp=1536, double_blocks=3, single_blocks=2),
        replace(MINI, double_blocks=12, single_blocks=11),
        replace(MINI, channels=4, context=96, pooled=48),
        replace(MINI, concat_channels=80),
        replace(MINI, concat_channels=16),
    ],
    ids=["dev", "schnell", "wide", "deep", "other inputs", "Fill", "Canny"],
)
def test_sizes_are_read_from_the_file(tmp_path, config):
    path = tmp_path / "flux.safetensors"
    write_checkpoint(str(path), config)
    file = read_model(str(path))
    assert (file.config, file.ignored) == (config, ()) and file.header.keys() == load_file(path).keys()
    model = load_model(spec_of(path), CPU)
    assert model.config == config
    tensors = load_file(path)
    state = model.state_dict()
    assert len(state) == len(tensors)
    for name, tensor in state.items():
        assert torch.equal(tensor, tensors[model.file_key(name)])


def test_full_sized_headers(tmp_path):
    """FLUX.1 dev's own sizes, without its 24 GB."""
    with torch.device("meta"):
        model = FLUX_DEV.build()
    header = {model.file_key(name): TensorInfo(tuple(p.shape), torch.bfloat16) for name, p in model.named_parameters()}
    assert detect(header, "dev") == FLUX_DEV
    assert len(header) == 780
    assert "double_blocks.18.txt_attn.norm.key_norm.scale" in header


def test_newer_norm_names(mini, changed):
    tensors = load_file(mini)
    scales = [name for name in tensors if name.endswith("_norm.scale")]
    assert len(scales) == 6
    path = changed(scales, {name.replace(".scale", ".weight"): tensors[name] + 1 for name in scales})
    state = load_model(spec_of(path), CPU).state_dict()
    assert torch.equal(state["single_blocks.0.norm.key_norm.scale"], torch.full((128,), 2.0))


@pytest.mark.parametrize("storage, held", [(None, "bfloat16"), ("float32", "float32"), ("float16", "float16")])
def test_storage_type(tmp_path, storage, held):
    path = tmp_path / "half.safetensors"
    write_checkpoint(str(path), MINI, dtype=torch.bfloat16)
    model = load_model(ModelSpec.of_file(str(path), storage=storage, compute="float32"), CPU)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, held)}
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_quantised_files_are_refused(changed, dtype):
    name = "double_blocks.0.img_attn.qkv.weight"
    path = changed((name,), {name: torch.zeros(384, 128, dtype=dtype)})
    text = refusal(path)
    assert "quantised" in text and name in text and str(dtype).removeprefix("torch.") in text


@pytest.mark.parametrize("channels", [8, 48])
def test_input_channels_of_no_known_model_are_refused(changed, channels):
    assert "it is not one of FLUX.1 dev, schnell, Kontext, Fill" in refusal(
        changed(("img_in.weight",), {"img_in.weight": torch.zeros(128, channels * 4)})
    )


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, -1], ids=str)
def test_truncated_files_are_refused(mini, tmp_path, kept):
    data = mini.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(data[: int(len(data) * kept)] if isinstance(kept, float) else data[:kept])
    text = refusal(path)
    assert text.startswith(f"Download {path} again") and "truncated" in text


@pytest.mark.parametrize(
    "start",
    [
        b"\xff" * 8,
        (2**40).to_bytes(8, "little"),
        (10).to_bytes(8, "little") + b"not json!!",
        b"GGUF" + b"\x07" * 60,
    ],
    ids=["length", "huge", "json", "gguf"],
)
def test_corrupt_headers_are_refused(mini, tmp_path, start):
    path = tmp_path / "corrupt.safetensors"
    path.write_bytes(start + mini.read_bytes()[len(start) :])
    assert "truncated, corrupt or of another format" in refusal(path)


def test_a_directory_is_refused(tmp_path):
    assert refusal(tmp_path).endswith("Is a directory")


def test_a_file_that_may_not_be_read_says_so(mini, monkeypatch):
    def deny(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("builtins.open", deny)
    assert refusal(mini).endswith("Permission denied")


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no model file .*absent"):
        read_model(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    "name",
    [
        "final_layer.linear.bias",
        "final_layer.linear.weight",
        "txt_in.weight",
        "double_blocks.0.txt_attn.norm.key_norm.scale",
        "single_blocks.0.linear2.weight",
        "guidance_in.out_layer.bias",
    ],
)
def test_a_missing_tensor_is_named(changed, name):
    text = refusal(changed((name,)))
    assert "missing" in text and name.replace("txt_attn", "txt.attn") in text.replace("txt_attn", "txt.attn")


def test_many_missing_tensors_are_counted(mini, changed):
    """What to do comes first: ComfyUI cuts long messages."""
    names = [name for name in load_file(mini) if name.startswith("single_blocks.0.linear") or "final_layer" in name]
    text = refusal(changed(names))
    assert text.startswith("Download ") and "an incomplete FLUX.1 file, without 8 of" in text
    assert text.endswith("and 5 more") and text.count(".weight'") + text.count(".bias'") == 3


@pytest.mark.parametrize("name", ["img_in.weight", "double_blocks.0.img_attn.qkv.weight"])
def test_a_missing_tensor_that_tells_the_family_is_named(changed, name):
    text = refusal(changed((name,)))
    assert "an incomplete FLUX.1 file, without 1 of" in text and text.endswith(f"tensors: '{name}'")


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_missing_block_is_named(tmp_path, block):
    """Even where the others would make a smaller model."""
    path = tmp_path / "flux.safetensors"
    write_checkpoint(str(path), replace(MINI, single_blocks=4))
    names = f"single_blocks.{block}."
    save_file({name: t for name, t in load_file(path).items() if not name.startswith(names)}, path)
    assert f"'single_blocks.{block}.linear1." in refusal(path)


def test_a_part_of_a_model_is_told(changed):
    path = changed(("final_layer.linear.weight",))
    part = path.rename(path.parent / "model-00001-of-00003.safetensors")
    assert refusal(part).startswith("Use the model in one file")


@pytest.mark.parametrize(
    "name, shape",
    [
        ("time_in.in_layer.weight", (128, 255)),
        ("single_blocks.0.norm.key_norm.scale", (64,)),
        ("img_in.weight", (100, 64)),
        ("img_in.weight", (128,)),
        ("txt_in.weight", (128,)),
        ("final_layer.linear.weight", ()),
    ],
)
def test_a_wrong_shape_is_named(changed, name, shape):
    text = refusal(changed((name,), {name: torch.zeros(shape)}))
    assert name in text or "hidden size 100" in text


@pytest.mark.parametrize("how", ["replaced", "touched"])
def test_a_file_that_changed_after_the_client_looked_is_refused(mini, tmp_path, how):
    path = tmp_path / "flux.safetensors"
    path.write_bytes(mini.read_bytes())
    spec = spec_of(path)
    if how == "replaced":
        write_checkpoint(str(path), replace(MINI, double_blocks=2))
    else:
        os.utime(path, ns=(spec.file.mtime_ns, spec.file.mtime_ns + 1))
    assert f"was {'changed' if how == 'touched' else how} since this workflow loaded it" in refusal(path, spec)
    assert load_model(spec_of(path), CPU)


def test_a_file_removed_after_the_client_looked_is_refused(mini, tmp_path):
    path = tmp_path / "flux.safetensors"
    path.write_bytes(mini.read_bytes())
    spec = spec_of(path)
    path.unlink()
    assert "there is no model file" in refusal(path, spec)
