"""nvfp4, mxfp8 and int8, unpacked: values by another way, some rows and columns of them, and what a file may say."""

import pytest
import torch
from formats import packed_layers
from packed_layers import LAYERS, in_memory
from safetensors.torch import load_file
from support import load_model, randn, spec_of

from fastusp_backend.models.files import read_model
from fastusp_backend.weights import packings, scaled_blocks
from fastusp_backend.weights.stored import Stored

pytestmark = pytest.mark.unit

F32, CPU = torch.float32, torch.device("cpu")
KINDS = [kind for kind in LAYERS if kind != "fp8"]
LAYER = "single_blocks.0.linear1"


@pytest.mark.parametrize("rows, columns", [(7, 512), (129, 768), (260, 1280)])
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind, rows, columns, monkeypatch):
    monkeypatch.setattr(packings, "PIECE", 2048)
    stored, values = in_memory(kind, rows, columns, seed=1)
    assert 0.5 < values.std() * columns**0.5 < 2 and abs(values.mean()) < 0.05 * values.std()
    for dtype in (F32, torch.bfloat16):
        assert torch.equal(stored.values(dtype), values.to(dtype))
    some, few = slice(3, 6), slice(256, columns)
    assert torch.equal(stored.values(F32, some), values[some])
    assert torch.equal(stored.values(F32, some, few), values[some, few])
    assert torch.equal(stored.values(F32, columns=slice(5, 77)), values[:, 5:77])
    up, down = randn(rows, 2, seed=2), randn(2, columns, seed=3)
    summed = Stored(stored.data, stored.scale, stored.packing, (up, down)).values(F32, some, few)
    torch.testing.assert_close(summed, (values + up @ down)[some, few])


@pytest.mark.parametrize("kind, rows, columns", [("nvfp4", 130, 80), ("mxfp8", 33, 160), ("nvfp4", 1, 16)])
def test_scales_that_end_within_a_tile(kind, rows, columns):
    stored, values = in_memory(kind, rows, columns, seed=1)
    assert torch.equal(stored.values(F32), values)


@pytest.mark.parametrize("kind", ["int8_convrot", "int4_convrot"])
@pytest.mark.parametrize("group", scaled_blocks.GROUPS)
def test_rotations_are_their_own_inverse(group, kind):
    stored, values = in_memory(kind, 6, 2048, seed=1, group=group)
    assert stored.packing.endswith(f"_{group}") and torch.equal(stored.values(F32), values)
    matrix = scaled_blocks.hadamard(group, CPU)
    assert torch.equal(matrix @ matrix, torch.eye(group) * group) and torch.equal(matrix, matrix.T)
    assert matrix.sum(1).unique().tolist() == [group**0.5]  # a regular one


def test_numbers_that_scales_may_be():
    """comfy-kitchen takes a scale of code 0, 2^-127, for nought."""
    blocks = torch.tensor([[0, *[0x38] * 32], [1, *[0x38] * 32], [254, *[0x38] * 32]], dtype=torch.uint8)
    values = packings.unpack(blocks, "mxfp8", F32)
    assert values[:, 0].tolist() == [0.0, 2.0**-126, 2.0**127]


@pytest.mark.parametrize(
    "kind, said, packing",
    [
        ("int8_convrot", {}, "int8_convrot_256"),
        ("int8_convrot", {"convrot_groupsize": 64}, "int8_convrot_64"),
        ("int8_convrot", {"convrot": False}, "int8"),
        ("int8_rows", {"params": {"convrot": True, "convrot_groupsize": 16}}, "int8_convrot_16"),
        ("int8_rows", {"params": {"convrot": True}, "convrot": False}, "int8"),
        ("int8_rows", {"convrot": True}, "int8_convrot_256"),
        ("int8_rows", {"params": None, "full_precision_matrix_mult": True}, "int8"),
        ("int8", {}, "int8"),
        ("int4_convrot", {"linear_dtype": "int8"}, "int4_convrot_256"),
        ("int4_convrot", {"convrot": False, "convrot_groupsize": 64}, "int4_convrot_64"),
        ("nvfp4", {"group_size": 16}, "nvfp4"),
    ],
)
def test_what_is_said_of_a_layer(mini, tmp_path, kind, said, packing):
    packed_layers(load_file(mini), tmp_path / "x", kind, **said)
    info = read_model(str(tmp_path / "x")).header[f"{LAYER}.weight"]
    assert info.packing == packing and info.shape == (1280, 256)
    assert (info.scale is None) == (kind in ("int8_rows", "int8_convrot", "int4_convrot"))


def test_scales_of_other_shapes_and_types(mini, tmp_path):
    """One for each row without a dimension of its own, and in 16 bits; of blocks as bytes."""
    values = {}
    for name, change in {
        "vector": lambda t: t.flatten(),
        "half": lambda t: t.bfloat16(),
        "bytes": lambda t: t.view(torch.uint8),
        "one": lambda t: t[:1],
    }.items():
        kind = "nvfp4" if name == "bytes" else "int8_rows"

        def changed(rows, columns, seed, make=LAYERS[kind], change=change):
            tensors, entry, _ = make(rows, columns, seed)
            return tensors | {"weight_scale": change(tensors["weight_scale"])}, entry, tensors["weight"]

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(LAYERS, kind, changed)
            packed_layers(load_file(mini), tmp_path / name, kind)
        stored = load_model(spec_of(tmp_path / name), CPU).get_submodule(LAYER).stored
        values[name] = stored.dequantise()
        assert stored.scale.shape == (() if name in ("bytes", "one") else (1280, 1))
    number = list(load_file(mini)).index(f"{LAYER}.weight")
    expected = LAYERS["int8_rows"](1280, 256, seed=number)
    assert torch.equal(values["vector"], expected[2])
    quants, scale = expected[0]["weight"].float(), expected[0]["weight_scale"]
    assert torch.equal(values["half"], quants * scale.bfloat16().float())
    assert torch.equal(values["one"], quants * scale[0])
    assert torch.equal(values["bytes"], LAYERS["nvfp4"](1280, 256, seed=number)[2])


def test_four_values_rotated_by_hand():
    """Each is half the sum, less the one that lies opposite."""
    quants = torch.tensor([[1, 2, 3, 10]], dtype=torch.int8)
    stored = Stored(quants.view(torch.uint8), torch.tensor(2.0), "int8_convrot_4")
    assert stored.values(F32).tolist() == [[-4.0, 10.0, 12.0, 14.0]]
