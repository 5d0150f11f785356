"""FLUX in diffusers' key layout: the same weights, whether its projections are split or fused there."""

from dataclasses import replace

import pytest
import torch
from formats import MINI, as_gguf
from patched import LORA, QKV, TENSORS, everything, loaded
from safetensors.torch import load_file, save_file
from support import SMALL_FLUX2, load_model, spec_of

from benchmarks.diffusers_weights import to_diffusers
from fastusp_backend.engine.patching import PatchedWeights
from fastusp_backend.errors import CheckpointError
from fastusp_backend.models.files import model_and_plans, read_model
from fastusp_backend.models.synthetic import write_checkpoint

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
PREFIX = "model.diffusion_model."
Q, K, V = (f"transformer_blocks.0.attn.{name}.weight" for name in ("to_q", "to_k", "to_v"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """An original file of several blocks."""
    path = tmp_path_factory.mktemp("layout") / "flux.safetensors"
    write_checkpoint(str(path), replace(MINI, double_blocks=2, single_blocks=3), seed=3)
    return path


def fused(state):
    """As `fuse_qkv_projections` has it."""
    for block in {key.partition(".attn.")[0] for key in state if ".attn.to_q." in key}:
        for leaf in ("weight", "bias"):
            names = {"to_qkv": ("to_q", "to_k", "to_v")}
            if not block.startswith("single"):
                names["to_added_qkv"] = ("add_q_proj", "add_k_proj", "add_v_proj")
            for whole, parts in names.items():
                state[f"{block}.attn.{whole}.{leaf}"] = torch.cat(
                    [state.pop(f"{block}.attn.{part}.{leaf}") for part in parts]
                )
    return state


def same(path, original, dtype=None) -> None:
    model, expected = load_model(spec_of(path), CPU), load_model(spec_of(original), CPU)
    assert model.config == expected.config
    for (name, got), (_, want) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(got, want if dtype is None else want.to(dtype)), name


@pytest.mark.parametrize("form", ["split", "fused", "prefixed", "bfloat16"])
def test_flux1(flux, tmp_path, form):
    state = to_diffusers(load_file(flux), MINI.hidden)
    if form == "fused":
        state = fused(state)
    if form == "prefixed":
        state = {PREFIX + name: tensor for name, tensor in state.items()}
    dtype = torch.bfloat16 if form == "bfloat16" else None
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in state.items()}, tmp_path / "x")
    same(tmp_path / "x", flux, dtype)


def test_flux2(tmp_path):
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    write_checkpoint(str(tmp_path / "original"), SMALL_FLUX2, seed=4)
    state = single_file.convert_flux2_transformer_checkpoint_to_diffusers(load_file(tmp_path / "original"))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "x")
    same(tmp_path / "x", tmp_path / "original")


def test_what_it_takes_and_what_is_ignored(flux, tmp_path):
    state = {name: t.bfloat16().contiguous() for name, t in to_diffusers(load_file(flux), MINI.hidden).items()}
    save_file(state | {"note": torch.ones(2)}, tmp_path / "x")
    file = read_model(str(tmp_path / "x"))
    assert file.ignored == ("note",)
    _, plans = model_and_plans(file.header, spec_of(tmp_path / "x"))
    (_, whole), values = model_and_plans(read_model(str(flux)).header, spec_of(flux)), 2
    assert sum(plan.nbytes for plan in plans.values()) == sum(plan.nbytes for plan in whole.values()) // values
    plan = plans["double_blocks.0.img.attn.qkv.weight"]
    assert not plan.unchanged and not plan.rounded_to_fp8 and plan.reading_bytes == 3 * 2 * 768 * 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_patches_are_undone_from_the_parts(flux, tmp_path, dtype):
    state = to_diffusers(load_file(flux), MINI.hidden)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in state.items()}, tmp_path / "x")
    checkpoint = loaded(tmp_path / "x")
    weights, before = PatchedWeights(checkpoint), everything(checkpoint)
    weights.change({f"{QKV}.weight": (LORA,)}, TENSORS, base=0, number=1)
    after = everything(checkpoint)
    changed = [name for name in before if not torch.equal(before[name][1], after[name][1])]
    assert changed == ["double_blocks.0.img.attn.qkv.weight"]
    weights.change({}, {}, base=None, number=0)
    assert all(torch.equal(before[name][1], now) for name, (_, now) in everything(checkpoint).items())


def test_packed_in_gguf(flux, tmp_path):
    values = as_gguf(to_diffusers(load_file(flux), MINI.hidden), tmp_path / "x.gguf", "Q8_0")
    linear = load_model(spec_of(tmp_path / "x.gguf"), CPU).get_submodule("double_blocks.0.img.attn.qkv")
    assert linear.packing == "Q8_0"
    assert torch.equal(linear.stored.dequantise(), torch.cat([values[name] for name in (Q, K, V)]))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop(K), "incomplete FLUX.1 file, without 1 of its"),
        (lambda s: s.pop("proj_out.weight"), "is a part of FLUX in diffusers' key layout, or lacks some of it"),
        (lambda s: s.update({"img_in.weight": s["x_embedder.weight"].clone()}), "has 'img_in.weight' twice"),
        (lambda s: s.update({K: s[K].half()}), "which make one layer, are not of one type and size"),
        (lambda s: s.update({K: s[K][:, :128].contiguous()}), "are not of one type and size"),
        (lambda s: s.update({K: s[K][:128].contiguous()}), "are not of one type and size"),
        (lambda s: s.update({K: torch.zeros(())}), "are not of one type and size"),
        (
            lambda s: s.update({Q: torch.zeros(()), K: torch.zeros(()), V: torch.zeros(())}),
            "is (), expected (768, 256)",
        ),
        (lambda s: s.update({"norm_out.linear.weight": torch.zeros(511, 256)}), "(511, 256), expected (512, 256)"),
        (
            lambda s: s.update({f"{K}_scale": torch.ones(())}),
            f"quantised FLUX in diffusers' key layout, as in {{path}} ('{K}_scale')",
        ),
        (lambda s: s.update({"scaled_fp8": torch.zeros(2)}), "quantised FLUX in diffusers' key layout"),
        (lambda s: s.update({f"{K}.quant_state.bitsandbytes__nf4": torch.ones(2)}), "quantised as bitsandbytes NF4"),
    ],
)
def test_what_is_refused(flux, tmp_path, change, words):
    state, path = to_diffusers(load_file(flux), MINI.hidden), tmp_path / "x.safetensors"
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    with pytest.raises(CheckpointError) as refused:
        read_model(str(path))
    assert words.format(path=path) in str(refused.value)
