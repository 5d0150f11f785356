"""Patches in weights however they are stored: rounded to the nearest stored value, in place, and undone to the bit."""

from dataclasses import replace

import msgspec
import pytest
import torch
import torch.nn.functional as F
from formats import LIMITS, write
from patched import LORA, MINI, NONE, NORM, PATCHES, QKV, TENSORS, changed, everything, in_memory, loaded
from safetensors.torch import load_file
from support import randn, spec_of

from fastusp_backend.config import WeightPatch
from fastusp_backend.engine.checkpoint import Checkpoint
from fastusp_backend.engine.patching import PatchedWeights, plan_update
from fastusp_backend.errors import CheckpointError, PatchesLost, RequestError
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.weights.storage_plan import plan_storage
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    path = tmp_path_factory.mktemp("patching") / "mini.safetensors"
    write_checkpoint(str(path), MINI, seed=1)
    return path


def assert_nearest(data: torch.Tensor, want: torch.Tensor) -> None:
    """No value of data's type is nearer to `want` (float32)."""
    if data.dtype not in LIMITS:
        assert torch.equal(data, want.to(data.dtype))
        return
    table = torch.arange(256, dtype=torch.uint8).view(data.dtype).float()
    table = table[table.isfinite()].unique()
    above = torch.searchsorted(table, want.contiguous()).clamp(1, len(table) - 1)
    nearest = torch.minimum((want - table[above - 1]).abs(), (want - table[above]).abs())
    assert torch.equal((want - data.float()).abs(), nearest)


IN_FILE, WIDER = (8, 256), (8, 512)


@pytest.mark.parametrize(
    "dtype, packing, types, shape, patched, update",
    [
        (torch.bfloat16, "", {}, IN_FILE, False, "in_place"),
        (torch.bfloat16, "", {}, IN_FILE, True, "reapply"),
        (torch.bfloat16, "", {}, None, True, "restore"),
        (torch.bfloat16, "", {}, WIDER, False, "widen"),
        (torch.bfloat16, "", {}, WIDER, True, "widen"),
        (torch.float32, "", {"storage": "bfloat16"}, IN_FILE, False, "in_place"),
        (torch.float8_e4m3fn, "", {}, IN_FILE, False, "in_place"),
        (torch.float8_e4m3fn, "", {}, IN_FILE, True, "reapply"),
        (torch.bfloat16, "", {"storage": "float8_e4m3fn"}, IN_FILE, False, "from_file"),
        (torch.bfloat16, "", {"storage": "float8_e4m3fn"}, IN_FILE, True, "from_file"),
        (torch.bfloat16, "", {"storage": "float8_e4m3fn"}, WIDER, False, "from_file"),
        (torch.bfloat16, "", {"storage": "float8_e4m3fn"}, None, True, "restore"),
        (torch.float32, "Q8_0", {}, IN_FILE, False, "factors"),
        (torch.float32, "Q8_0", {}, IN_FILE, True, "factors"),
        (torch.float32, "Q8_0", {}, None, True, "factors"),
        (torch.float32, "Q8_0", {"storage": "bfloat16"}, IN_FILE, True, "reapply"),
        (torch.float32, "Q8_0", {"storage": "float8_e5m2"}, IN_FILE, True, "from_file"),
    ],
)
def test_how_a_weight_is_updated(dtype, packing, types, shape, patched, update):
    spec = msgspec.structs.replace(spec_of(__file__), **types)
    plan = plan_storage(TensorInfo(IN_FILE, dtype, packing=packing), spec, "linear")
    assert plan_update(plan, shape, patched=patched) == update


STORAGES = {
    "fp8_e4m3fn": {},
    "fp8_e5m2": {},
    "scaled_old": {},
    "scaled_metadata_e5m2": {},
    "scaled_tensors": {},
    "scaled_tensors, by rows": {"linear": "fp8"},
    "fp8_e4m3fn, by rows": {"linear": "fp8"},
    "plain, by rows": {"linear": "fp8"},
    "fp8_e5m2, by rows": {"linear": "fp8"},
    "gguf_Q8_0, by rows": {"linear": "fp8"},
    "plain, fp8": {"storage": "float8_e4m3fn"},
    "plain, bf16": {"storage": "bfloat16"},
    "gguf_Q8_0, bf16": {"storage": "bfloat16"},
}
ROUNDED = ("plain, by rows", "fp8_e5m2, by rows", "gguf_Q8_0, by rows", "plain, fp8")
"""Of these, patches find the file's values, not those that were rounded to fp8: all is rounded once."""


@pytest.mark.parametrize("name", STORAGES)
def test_patches_are_rounded_to_the_nearest_and_leave_no_trace(mini, tmp_path, name):
    path, form = tmp_path / "model", name.split(",")[0]
    if form == "plain":
        path, values = mini, load_file(mini)
    else:
        values = write(form, mini, path)
    checkpoint, content = loaded(path, **STORAGES[name]), path.read_bytes()
    weights, before = PatchedWeights(checkpoint), everything(checkpoint)
    old = {key: in_memory(checkpoint, key).dequantise() for key in PATCHES}
    if name in ROUNDED:
        old[f"{QKV}.weight"] = values[f"{QKV}.weight"]
    assert weights.change(PATCHES, TENSORS, base=0, number=1) == (0, 3)

    after, names = everything(checkpoint), {checkpoint.model.module_key(key) for key in PATCHES}
    scale = checkpoint.model.module_key(f"{QKV}.weight").replace(".weight", ".scale")
    assert changed(before, after) == names | ({scale} & before.keys())
    assert_nearest(in_memory(checkpoint, f"{QKV}.bias").data, old[f"{QKV}.bias"] + TENSORS["b"])
    assert_nearest(in_memory(checkpoint, NORM).data, TENSORS["n"])
    want, stored = (
        old[f"{QKV}.weight"] + 0.7 * (TENSORS["up"] @ TENSORS["down"]),
        in_memory(checkpoint, f"{QKV}.weight"),
    )
    if scale in before:
        largest = want.abs().amax(1, keepdim=True) if stored.scale.dim() else want.abs().amax()
        torch.testing.assert_close(stored.scale, largest / LIMITS[stored.data.dtype])
        assert stored.scale.dim() == (2 if name.endswith("by rows") else 0)
        want = want / stored.scale
    assert_nearest(stored.data, want)

    assert weights.change({f"{QKV}.weight": (LORA, LORA)}, TENSORS, base=1, number=2) == (1, 1)
    assert weights.change(PATCHES, TENSORS, base=None, number=3) == (3, 3)
    assert not changed(after, everything(checkpoint))
    assert weights.change(NONE, {}, base=3, number=0) == (3, 0)
    assert not changed(before, everything(checkpoint))
    assert path.read_bytes() == content


@pytest.mark.parametrize("spec", [{"linear": "fp8"}, {"storage": "float8_e4m3fn"}], ids=str)
def test_small_differences_are_not_lost_in_fp8(mini, spec):
    """Each of them is far less than fp8's spacing; together they are what a LoRA does."""
    checkpoint = loaded(mini, **spec)
    old, tensors = load_file(mini)[f"{QKV}.weight"], {"diff": 0.01 * load_file(mini)[f"{QKV}.weight"].sign() * 0.06}
    patch = WeightPatch(kind="diff", tensors={"diff": "diff"}, strength=1.0)
    PatchedWeights(checkpoint).change({f"{QKV}.weight": (patch,)}, tensors, base=0, number=1)
    seen = (in_memory(checkpoint, f"{QKV}.weight").dequantise() - old) * old.sign()
    assert seen.mean() == pytest.approx(6e-4, rel=0.2), seen.mean()


WIDE = {
    "img_in.weight": (WeightPatch(kind="lora", tensors={"up": "u", "down": "d"}, strength=0.7, reshape=(256, 128)),),
    f"{QKV}.weight": (LORA,),
}
WIDENING = {"u": randn(256, 4, seed=5), "d": randn(4, 128, seed=6), "narrow": randn(256, 64, seed=7), **TENSORS}


@pytest.mark.parametrize("name", ["plain", "plain, bf16", "plain, fp8", "fp8_e4m3fn", "scaled_metadata", "gguf_Q4_K"])
def test_a_weight_that_is_widened_moves_once_and_leaves_no_trace(mini, tmp_path, name):
    """The image's input; the model then takes an image. Zeros come behind the values, then the LoRA."""
    path, form = tmp_path / "model", name.split(",")[0]
    path = mini if form == "plain" else path
    values = load_file(mini) if form == "plain" else write(form, mini, path)
    checkpoint, moved = loaded(path, **STORAGES.get(name, {})), []
    weights, config = PatchedWeights(checkpoint, lambda: moved.append(1)), checkpoint.model.config
    before, rounds = everything(checkpoint), checkpoint.plans["img_in.weight"].rounded_to_fp8
    old = values["img_in.weight"] if rounds else in_memory(checkpoint, "img_in.weight").dequantise()
    packed = bool(in_memory(checkpoint, f"{QKV}.weight").packing)
    weights.change(WIDE, WIDENING, base=0, number=1)
    assert checkpoint.model.config == replace(config, concat_channels=16) and len(moved) == 1 + packed
    stored = in_memory(checkpoint, "img_in.weight")
    want = F.pad(old, (0, 64)) + 0.7 * (WIDENING["u"] @ WIDENING["d"])
    assert_nearest(stored.data, want if stored.scale is None else want / stored.scale)
    wide = everything(checkpoint)

    diff = WeightPatch(kind="diff", tensors={"diff": "narrow"}, strength=1.0)
    both = {"img_in.weight": (diff, *WIDE["img_in.weight"])}
    weights.change(both, WIDENING, base=1, number=2)
    assert changed(wide, everything(checkpoint)) - {"img_in.scale"} == {"img_in.weight"}
    weights.change({"img_in.weight": (diff,)}, WIDENING, base=2, number=3)
    assert checkpoint.model.config == config and in_memory(checkpoint, "img_in.weight").data.shape == (256, 64)
    weights.change(WIDE, WIDENING, base=None, number=4)
    assert bits(checkpoint) == {name: t.tolist() for name, (_, t) in wide.items()}
    weights.change(dict.fromkeys(WIDE, ()), {}, base=4, number=0)
    assert checkpoint.model.config == config
    assert bits(checkpoint) == {name: t.tolist() for name, (_, t) in before.items()}


def bits(checkpoint: Checkpoint) -> dict[str, list[int]]:
    return {name: t.tolist() for name, (_, t) in everything(checkpoint).items()}


def test_what_cannot_be_widened_is_refused_before_anything_changes(mini, tmp_path):
    write("gguf_Q8_0", mini, tmp_path / "packed")
    plain, packed = loaded(mini), loaded(tmp_path / "packed")
    tensors = {name: randn(*shape, seed=8) for name, shape in (("u", (256, 4)), ("d", (4, 320)), ("q", (768, 4)))}
    for checkpoint, key, up, wide, words in (
        (plain, "txt_in.weight", "u", (256, 320), "'txt_in.weight' cannot be widened from .256, 256. to .256, 320"),
        (plain, f"{QKV}.weight", "q", (768, 320), "qkv.weight' cannot be widened"),
        (plain, "img_in.weight", "u", (256, 320), "'img_in.weight' cannot be widened"),  # neither Canny's nor Fill's
        (packed, f"{QKV}.weight", "q", (768, 320), "not one that widens a matrix .768, 256. to .768, 320.; set"),
    ):
        weights, before = PatchedWeights(checkpoint), everything(checkpoint)
        patch = WeightPatch(kind="lora", tensors={"up": up, "down": "d"}, strength=1.0, reshape=wide)
        given = {f"{QKV}.bias": PATCHES[f"{QKV}.bias"], key: (patch,)}
        with pytest.raises(RequestError, match=words):
            weights.change(given, TENSORS | tensors, base=0, number=1)
        assert weights.number == 0 and not changed(before, everything(checkpoint))


@pytest.mark.parametrize("base", [1, 7])
def test_a_change_of_what_the_weights_do_not_hold_is_refused(mini, base):
    """It would be made to other weights than those that it was reckoned from."""
    checkpoint = loaded(mini)
    weights = PatchedWeights(checkpoint)
    weights.change(PATCHES, TENSORS, base=0, number=5)
    after = everything(checkpoint)
    for changes, tensors in ((NONE, {}), (PATCHES, TENSORS)):
        with pytest.raises(PatchesLost, match=f"do not hold patch set {base}"):
            weights.change(changes, tensors, base=base, number=6)
    assert weights.number == 5 and not changed(after, everything(checkpoint))


def test_a_reading_that_fails_leaves_the_state_unknown_and_can_be_repeated(mini, monkeypatch):
    checkpoint = loaded(mini)
    weights, before = PatchedWeights(checkpoint), everything(checkpoint)
    weights.change(PATCHES, TENSORS, base=0, number=1)
    reread = checkpoint.reread

    def fail(names):
        yield next(reread(names))
        raise CheckpointError("the file ends")

    monkeypatch.setattr(checkpoint, "reread", fail)
    with pytest.raises(CheckpointError):
        weights.change(NONE, {}, base=1, number=0)
    assert weights.number is None
    monkeypatch.undo()
    weights.change({}, {}, base=None, number=0)
    assert weights.number == 0 and not changed(before, everything(checkpoint))
