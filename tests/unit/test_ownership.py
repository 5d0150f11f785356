"""Which rank holds which modulation layer: all are held once, about as many bytes by each rank, and what a rank does
not hold keeps its form."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from formats import write
from patched import loaded
from support import SMALL, SMALL_CHROMA, SMALL_FLUX2, SMALL_QWEN, SMALL_SD3, SMALL_Z_IMAGE, randn, spec_of

from fastusp_backend.config import WeightPatch
from fastusp_backend.engine.checkpoint import Checkpoint
from fastusp_backend.engine.parking import resident_bytes, tensors_of
from fastusp_backend.engine.patching import PatchedWeights
from fastusp_backend.errors import RequestError
from fastusp_backend.models.files import read_model, storage_plans
from fastusp_backend.models.layers import Linear
from fastusp_backend.models.ownership import Ownership, balanced
from fastusp_backend.models.placement import place_file
from fastusp_backend.models.synthetic import (
    CHROMA,
    FLUX2_DEV,
    FLUX_DEV,
    QWEN_IMAGE,
    SD35_LARGE,
    SD35_MEDIUM,
    Z_IMAGE,
    write_checkpoint,
)
from fastusp_backend.weights.stored import Stored
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
MINI = replace(SMALL, hidden=256, heads=2, mlp=512, double_blocks=1, single_blocks=2, context=256, pooled=256)
PAGE = (Path(__file__).resolve().parents[2] / "docs/memory.md").read_text(encoding="utf-8")
FULL_SIZES = {"FLUX.1-dev": FLUX_DEV, "FLUX.2-dev": FLUX2_DEV, "Chroma": CHROMA, "Qwen-Image": QWEN_IMAGE}
FULL_SIZES |= {"SD 3.5 large": SD35_LARGE, "SD 3.5 medium": SD35_MEDIUM, "Z-Image": Z_IMAGE}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_owners_balance(ranks):
    sizes = [6] * 38 + [3] * 38 + [2]
    owners = balanced(sizes, ranks)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert sum(loads) == sum(sizes) and max(loads) - min(loads) <= 3
    assert owners == balanced(sizes, ranks)


@pytest.mark.any_processor
@pytest.mark.parametrize("name", FULL_SIZES)
@pytest.mark.parametrize("kind, dtype", [("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)])
def test_the_figures_of_the_page_on_memory(name, kind, dtype):
    with torch.device("meta"):
        model = FULL_SIZES[name].build()
    header = {model.file_key(name): TensorInfo(tuple(p.shape), dtype) for name, p in model.named_parameters()}
    spec = msgspec.structs.replace(spec_of(__file__), storage="bfloat16", keep_quantised=True)
    (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| {name}, {kind} |"))
    for ranks, most in zip((1, 2, 3, 4, 8), row.split("|")[2:-1], strict=True):
        nbytes = Ownership(model, storage_plans(model, header, spec), ranks).nbytes
        assert f"{max(nbytes) / 1e9:.1f}" == most.strip()
        if name != "Chroma":  # whose one network for modulations is a single rank's
            assert max(nbytes) < (1.004 if name in ("FLUX.1-dev", "Qwen-Image") else 1.008) * min(nbytes)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ownership")
    write_checkpoint(str(folder / "flux"), MINI, seed=1)
    write_checkpoint(str(folder / "qwen"), replace(SMALL_QWEN, hidden=256, heads=2, mlp=512, context=256), seed=2)
    write_checkpoint(str(folder / "flux2"), SMALL_FLUX2, seed=3)
    write_checkpoint(str(folder / "sd3"), SMALL_SD3, seed=4)
    write_checkpoint(str(folder / "chroma"), SMALL_CHROMA, seed=5)
    write_checkpoint(str(folder / "z_image"), SMALL_Z_IMAGE, seed=6)
    for name in ("scaled_tensors", "gguf_Q8_0"):
        write(name, folder / "flux", folder / name)
    return folder


@pytest.mark.any_processor
@pytest.mark.parametrize(
    "name, changes, ranks",
    [
        ("flux", {}, 1),
        pytest.param("flux", {}, 2, marks=pytest.mark.thorough),
        ("flux", {}, 9),  # more than layers
        ("flux", {"linear": "fp8"}, 2),
        ("flux", {"storage": "float8_e4m3fn"}, 2),
        ("flux2", {}, 3),
        ("flux2", {"linear": "fp8"}, 2),  # no biases
        pytest.param("flux2", {"linear": "fp8"}, 5, marks=pytest.mark.thorough),
        ("chroma", {}, 3),
        pytest.param("chroma", {"linear": "fp8"}, 2, marks=pytest.mark.thorough),
        ("qwen", {}, 3),
        ("sd3", {}, 3),
        pytest.param("sd3", {"linear": "fp8"}, 2, marks=pytest.mark.thorough),
        ("z_image", {}, 3),
        pytest.param("z_image", {"linear": "fp8"}, 2, marks=pytest.mark.thorough),
        ("scaled_tensors", {}, 2),
        ("scaled_tensors", {"linear": "fp8"}, 2),
        ("gguf_Q8_0", {}, 2),
        ("gguf_Q8_0", {"storage": "bfloat16"}, 2),
    ],
    ids=str,
)
def test_together_ranks_hold_a_model_once_and_know_its_forms(files, name, changes, ranks):
    path = files / name
    whole, *checkpoints = [
        loaded(path, rank, of, **changes) for rank, of in [(0, 1), *((rank, ranks) for rank in range(ranks))]
    ]
    modulations = {id(part) for layer in whole.model.modulations() for part in layer.modules()}
    layers = [{n: m for n, m in c.model.named_modules() if isinstance(m, Linear)} for c in checkpoints]
    for layer, module in whole.model.named_modules():
        if not isinstance(module, Linear):
            continue
        held = [mine[layer] for mine in layers if not mine[layer].weight.is_meta]
        assert len(held) == (1 if id(module) in modulations else ranks)
        assert all(torch.equal(x.stored.dequantise(), module.stored.dequantise()) for x in held)
        for mine in (rank[layer] for rank in layers):
            assert mine.bias is None or mine.weight.is_meta == mine.bias.is_meta
            assert form(mine.stored) == form(module.stored)
    header = read_model(str(path)).header
    expected = checkpoints[0].ownership.nbytes
    assert [resident_bytes(tensors_of(checkpoint.model)) for checkpoint in checkpoints] == expected
    assert place_file(header, checkpoints[0].spec, ranks).device_bytes == max(expected)


def form(stored: Stored) -> tuple:
    return stored.data.shape, stored.data.dtype, stored.packing, stored.scale is not None and stored.scale.shape


LAYERS = "double_blocks.0.img_mod.lin", "double_blocks.0.txt_mod.lin", "single_blocks.0.modulation.lin"


def loras(*layers: str) -> dict[str, tuple[WeightPatch, ...]]:
    patch = WeightPatch(kind="lora", tensors={"up": "up", "down": "down"}, strength=1.0)
    return {f"{layer}.weight": (patch,) for layer in layers}


def values(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    stored = {name: checkpoint.stored(name) for name in checkpoint.plans}
    return {name: weight.dequantise() for name, weight in stored.items() if not weight.data.is_meta}


@pytest.mark.parametrize("changes", [{}, {"storage": "float8_e4m3fn"}], ids=str)
def test_a_patch_is_its_owners(files, changes):
    """Every rank gives the same account; together they hold the patched weights of one, and then again the file's."""
    tensors = {"up": randn(1536, 4, seed=1), "down": randn(4, 256, seed=2)}
    whole, *ranks = [loaded(files / "flux", rank, of, **changes) for rank, of in ((0, 1), (0, 2), (1, 2))]
    plain, patched = values(whole), [PatchedWeights(checkpoint) for checkpoint in (whole, *ranks)]
    wanted = loras(*LAYERS[:2])

    def accounts(weights, number):
        return {p.change(weights, tensors, base=p.number, number=number) for p in patched}

    assert accounts(wanted, 1) == {(0, 2)}
    expected, (one, two) = values(whole), map(values, ranks)
    assert (one | two).keys() == expected.keys() and one.keys() != two.keys()
    assert all(torch.equal(value, expected[name]) for part in (one, two) for name, value in part.items())
    assert accounts({f"{LAYERS[0]}.weight": ()}, 2) == {(1, 0)}
    assert {p.change({}, tensors, base=None, number=3) for p in patched} == {(1, 0)}
    for part in map(values, (whole, *ranks)):
        assert all(torch.equal(value, plain[name]) for name, value in part.items())


def test_factors_beside_packed_weights_are_their_owners(files):
    tensors = {"up": randn(1536, 4, seed=1), "down": randn(4, 256, seed=2)}
    whole, *ranks = [loaded(files / "gguf_Q8_0", rank, of) for rank, of in ((0, 1), (0, 2), (1, 2))]
    patched, sizes = (
        [PatchedWeights(c) for c in (whole, *ranks)],
        [resident_bytes(tensors_of(c.model)) for c in (whole, *ranks)],
    )
    plain = values(whole)
    assert {p.change(loras(*LAYERS[:2]), tensors, base=0, number=1) for p in patched} == {(0, 2)}
    expected = values(whole)
    assert sum(not torch.equal(value, plain[name]) for name, value in expected.items()) == 2
    for part in map(values, ranks):
        assert all(torch.equal(value, expected[name]) for name, value in part.items())
    grown = [resident_bytes(tensors_of(c.model)) - size for c, size in zip((whole, *ranks), sizes, strict=True)]
    assert grown[0] == grown[1] + grown[2] > 0
    assert {p.change({}, tensors, base=None, number=2) for p in patched} == {(2, 0)}
    assert [resident_bytes(tensors_of(c.model)) for c in (whole, *ranks)] == sizes


def test_a_patch_that_does_not_fit_is_refused_by_all(files):
    value = WeightPatch(kind="set", tensors={"value": "value"}, strength=1.0)
    for patches, tensors, name, words in (
        (loras(LAYERS[2]), {"up": randn(9, 4, seed=1), "down": randn(4, 256, seed=2)}, "flux", "does not fit a weight"),
        ({f"{LAYERS[2]}.weight": (value,)}, {"value": randn(768, 256, seed=1)}, "gguf_Q8_0", "take plain LoRAs"),
    ):
        for rank in range(2):
            weights = PatchedWeights(loaded(files / name, rank, 2))
            with pytest.raises(RequestError, match=words):
                weights.change(patches, tensors, base=0, number=1)
            assert weights.number == 0
