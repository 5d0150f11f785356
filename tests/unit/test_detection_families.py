"""FLUX.2 and Qwen-Image files of any size are recognised and read; what does not fit is named."""

from dataclasses import replace
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import SMALL_FLUX2, SMALL_QWEN, load_model, spec_of

from fastusp_backend.errors import CheckpointError
from fastusp_backend.models.detection import detect
from fastusp_backend.models.files import read_model
from fastusp_backend.models.synthetic import FLUX2_DEV, TINY_FLUX, write_checkpoint
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
MINI_FLUX2 = replace(SMALL_FLUX2, hidden=128, heads=1, mlp=256, double_blocks=1, single_blocks=1)
MINI_QWEN = replace(SMALL_QWEN, hidden=128, heads=1, mlp=256, blocks=1)


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as refused:
        load_model(spec_of(path), CPU)
    assert str(path) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        MINI_FLUX2,
        replace(MINI_FLUX2, guidance=False, context=96),
        replace(MINI_FLUX2, hidden=384, heads=3, mlp=1152, double_blocks=3, single_blocks=11),
    ],
    ids=["dev", "klein", "wide and deep"],
)
def test_sizes_of_flux2(tmp_path, config):
    path = tmp_path / "flux2.safetensors"
    write_checkpoint(str(path), config)
    model = load_model(spec_of(path), CPU)
    assert model.config == config
    tensors = load_file(path)
    state = model.state_dict()
    assert {model.file_key(name) for name in state} == tensors.keys()
    assert all(torch.equal(tensor, tensors[model.file_key(name)]) for name, tensor in state.items())


def test_full_sized_flux2_headers():
    """FLUX.2 dev's own sizes and those of klein, without their files; the names are those of the original layout."""
    klein = {"guidance": False, "double_blocks": 5, "single_blocks": 20, "context": 7680}
    small = replace(FLUX2_DEV, hidden=3072, heads=24, mlp=9216, **klein)
    for config, billions in ((FLUX2_DEV, 32.2), (small, 3.9)):
        with torch.device("meta"):
            model = config.build()
        shapes = {model.file_key(name): tuple(p.shape) for name, p in model.named_parameters()}
        assert detect({name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()}, "file") == config
        assert sum(map(prod, shapes.values())) / 1e9 == pytest.approx(billions, abs=0.05)
        assert not any(name.endswith("bias") for name in shapes)
        assert shapes["single_blocks.0.linear1.weight"] == (9 * config.hidden, config.hidden)
        assert shapes["double_stream_modulation_txt.lin.weight"] == (6 * config.hidden, config.hidden)


@pytest.mark.parametrize(
    "name, tensor, words",
    [
        ("txt_in.weight", None, "incomplete FLUX.2 file, without 1 of its 27 tensors: 'txt_in.weight'"),
        ("single_stream_modulation.lin.weight", None, "tensors: 'single_stream_modulation.lin.weight'"),
        ("img_in.weight", torch.zeros(128, 64), "takes 64 values per token and gives 128: it is not one of FLUX.2 dev"),
        ("double_stream_modulation_img.lin.weight", None, "an incomplete FLUX.2 file, without 1 of its 27"),
        ("double_blocks.0.txt_mlp.0.weight", torch.zeros(256, 128), "is (256, 128), expected (512, 128)"),
    ],
)
def test_unfit_flux2_files(tmp_path, name, tensor, words):
    path = tmp_path / "flux2.safetensors"
    write_checkpoint(str(path), MINI_FLUX2)
    state = load_file(path) | {name: tensor}
    save_file({key: t for key, t in state.items() if t is not None}, path)
    assert words in refusal(path)


@pytest.fixture
def changed_qwen(tmp_path):
    """changed_qwen(tensors): a small Qwen-Image file with some tensors replaced, or dropped where None, as a path."""

    def write(**tensors):
        path = tmp_path / "qwen.safetensors"
        write_checkpoint(str(path), MINI_QWEN)
        state = load_file(path) | tensors
        save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
        return path

    return write


@pytest.mark.parametrize(
    "config",
    [
        MINI_QWEN,
        replace(MINI_QWEN, hidden=384, heads=3, mlp=1536, blocks=11),
        replace(MINI_QWEN, channels=4, context=96),
        replace(MINI_QWEN, reference_method="index_timestep_zero"),
    ],
    ids=["mini", "wide and deep", "other inputs", "Edit 2511"],
)
def test_sizes_of_qwen_image(tmp_path, config):
    path = tmp_path / "qwen.safetensors"
    write_checkpoint(str(path), config)
    model = load_model(spec_of(path), CPU)
    assert model.config == config
    tensors = load_file(path)
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_full_sized_qwen_image():
    """Qwen-Image's own sizes and names, without its 41 GB: 1933 tensors, 20.4 G parameters."""
    full = replace(MINI_QWEN, hidden=3072, heads=24, context=3584, mlp=12288, blocks=60)
    with torch.device("meta"):
        parameters = dict(full.build().named_parameters())
    header = {name: TensorInfo(tuple(p.shape), torch.bfloat16) for name, p in parameters.items()}
    assert detect(header, "qwen") == full
    assert len(header) == 1933
    assert sum(p.numel() for p in parameters.values()) == 20_430_401_088


def test_mage_flow_is_refused(changed_qwen):
    text = refusal(
        changed_qwen(
            **{
                "img_in.weight": torch.zeros(128, 128),
                "proj_out.weight": torch.zeros(128, 128),
                "txt_in.weight": torch.zeros(128, 2560),
            }
        )
    )
    assert "Mage-Flow" in text


@pytest.mark.parametrize(
    "name, tensor, words",
    [
        (
            "proj_out.weight",
            None,
            "incomplete Qwen-Image file, without 1 of its 45 tensors: 'proj_out.weight'",
        ),
        ("transformer_blocks.0.attn.norm_added_k.weight", None, "without 1 of"),
        ("txt_norm.weight", None, "incomplete Qwen-Image file, without 1 of its 45"),
        ("img_in.weight", torch.zeros(100, 64), "hidden size 100 is not a multiple of Qwen-Image's head dim"),
        ("proj_out.weight", torch.zeros(128, 128), "takes 64 values per patch and gives 128"),
        ("transformer_blocks.0.attn.to_q.weight", torch.zeros(128, 128, dtype=torch.int8), "is quantised as int8"),
        ("transformer_blocks.0.attn.to_q.weight", torch.zeros(128, 100), "expected (128, 128)"),
    ],
)
def test_unfit_qwen_image_files(changed_qwen, name, tensor, words):
    text = refusal(changed_qwen(**{name: tensor}))
    assert name in text or "hidden size" in text or "per patch" in text
    assert words in text


@pytest.mark.parametrize(
    "gone", [lambda n: n.startswith("double_blocks.2.") and n.endswith("bias"), lambda n: "_mod." in n]
)
def test_an_incomplete_file_keeps_its_familys_name(tmp_path, gone):
    """FLUX.2 needs fewer tensors, and has most of FLUX.1's: it is not nearer for that."""
    path = tmp_path / "flux.safetensors"
    write_checkpoint(str(path), replace(TINY_FLUX, double_blocks=3, single_blocks=9, hidden=128, heads=1, mlp=256))
    state = load_file(path)
    kept = {name: tensor for name, tensor in state.items() if not gone(name)}
    save_file(kept, path)
    with pytest.raises(CheckpointError) as error:
        read_model(str(path))
    count = len(state) - len(kept)
    assert f"incomplete FLUX.1 file, without {count} of its {len(state)} tensors" in str(error.value)
