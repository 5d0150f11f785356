"""LoRAs beside packed weights: added where they are unpacked, rounded once with them, gone without a trace."""

import pytest
import torch
import torch.nn.functional as F
from formats import write
from patched import MINI, loaded
from support import inputs, randn, relative_difference, spec_of

from fastusp_backend.config import Layout, Settings, WeightPatch
from fastusp_backend.engine import Engine, parking
from fastusp_backend.engine.checkpoint import Checkpoint
from fastusp_backend.engine.patching import PatchedWeights
from fastusp_backend.errors import RequestError
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.prompt import Prompt
from fastusp_backend.weights import packings

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
QKV, MLP, TXT = "double_blocks.0.img_attn.qkv", "single_blocks.0.linear2", "txt_in"
TENSORS = {
    "up": randn(768, 4, seed=1) * 0.1,
    "down": randn(4, 256, seed=2),
    "q_up": randn(256, 2, seed=3) * 0.1,
    "q_down": randn(2, 256, seed=4),
    "wide_up": randn(256, 3, seed=5) * 0.1,
    "wide_down": randn(3, 768, seed=6),
    "b": randn(768, seed=7),
}


def lora(name: str = "", strength: float = 0.7, **more) -> WeightPatch:
    return WeightPatch(kind="lora", tensors={"up": f"{name}up", "down": f"{name}down"}, strength=strength, **more)


PATCHES = {
    f"{QKV}.weight": (lora(alpha=2.0), lora("q_", -0.4, offset=(0, 512, 256))),
    f"{MLP}.weight": (lora("wide_"),),
    f"{TXT}.weight": (lora("q_"),),
    f"{QKV}.bias": (WeightPatch(kind="diff", tensors={"diff": "b"}, strength=1.0),),
}


def factors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """What those of qkv.weight are to be."""
    up, down = TENSORS["up"] * (0.7 * 2 / 4), TENSORS["down"]
    q_up = torch.cat([torch.zeros(512, 2), TENSORS["q_up"] * -0.4])
    return torch.cat([up, q_up], 1).to(dtype), torch.cat([down, TENSORS["q_down"]]).to(dtype)


@pytest.fixture(scope="module", params=["gguf_Q8_0", "gguf_Q4_K", "nvfp4", "mxfp8", "int8_convrot", "int4_convrot"])
def packed(request, tmp_path_factory):
    """A file, and what it means without a patch."""
    folder = tmp_path_factory.mktemp("packed")
    write_checkpoint(str(folder / "plain"), MINI, seed=1)
    return folder / "model", write(request.param, folder / "plain", folder / "model")


def layer(checkpoint: Checkpoint, key: str):
    return checkpoint.model.get_submodule(checkpoint.model.module_key(f"{key}.weight").removesuffix(".weight"))


def everything(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    named = [*checkpoint.model.named_parameters(), *checkpoint.model.named_buffers()]
    return {name: t.detach().clone() for name, t in named}


def assert_same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_all_uses_of_a_weight_see_its_loras(packed, monkeypatch):
    monkeypatch.setattr(packings, "PIECE", 2048)
    path, values = packed
    checkpoint = loaded(path)
    weights, before = PatchedWeights(checkpoint), everything(checkpoint)
    assert weights.change(PATCHES, TENSORS, base=0, number=1) == (0, 4)
    up, down = factors()
    qkv, want = layer(checkpoint, QKV), values[f"{QKV}.weight"] + up @ down
    assert relative_difference(want, values[f"{QKV}.weight"]) > 0.05
    bias, x = qkv.bias.detach().float(), randn(1, 5, 256, seed=8)
    torch.testing.assert_close(qkv(x), F.linear(x, want, bias))
    for rows in (slice(0, 256), slice(256, None)):  # the query's LoRA lies in the second
        torch.testing.assert_close(qkv(x, rows), F.linear(x, want[rows], bias[rows]))
        torch.testing.assert_close(qkv.rows(rows, torch.float32)[0], want[rows])
    wide, columns = layer(checkpoint, MLP), slice(256, 700)
    want, x = values[f"{MLP}.weight"] + 0.7 * TENSORS["wide_up"] @ TENSORS["wide_down"], randn(1, 5, 444, seed=9)
    torch.testing.assert_close(wide(x, columns=columns, bias=False), F.linear(x, want[:, columns]))
    out = randn(1, 5, 256, seed=10)
    torch.testing.assert_close(wide.add_to(out.clone(), x, columns), out + F.linear(x, want[:, columns]))

    after = everything(checkpoint)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert before.keys() - same == {checkpoint.model.module_key(key) for key in (f"{TXT}.weight", f"{QKV}.bias")}
    names = [checkpoint.model.module_key(f"{key}.weight").removesuffix("weight") for key in (QKV, MLP)]
    assert after.keys() - before.keys() == {name + factor for name in names for factor in ("up", "down")}
    assert weights.change({f"{MLP}.weight": ()}, {}, base=1, number=2) == (1, 0)
    assert wide.low_rank is None and qkv.low_rank is not None
    assert weights.change(PATCHES, TENSORS, base=None, number=3) == (3, 4)
    assert_same(after, everything(checkpoint))
    assert weights.change({}, {}, base=None, number=0) == (4, 0)
    assert_same(before, everything(checkpoint))


def test_sums_are_rounded_once(packed):
    """The factors are in the compute type, their sum with the packed values in float32."""
    path, values = packed
    checkpoint = loaded(path, storage="bfloat16", compute="bfloat16", keep_quantised=True)
    PatchedWeights(checkpoint).change(PATCHES, TENSORS, base=0, number=1)
    qkv = layer(checkpoint, QKV)
    assert all(torch.equal(*pair) for pair in zip(qkv.low_rank, factors(torch.bfloat16), strict=True))
    want = values[f"{QKV}.weight"] + (qkv.up @ qkv.down).float()
    assert torch.equal(qkv.stored.values(torch.bfloat16), want.bfloat16())


def test_what_cannot_be_factored_is_refused_before_anything_changes(packed):
    checkpoint = loaded(packed[0])
    moved = []
    weights = PatchedWeights(checkpoint, lambda: moved.append(1))
    weights.change(PATCHES, TENSORS, base=0, number=1)
    after = everything(checkpoint)
    whole = WeightPatch(kind="diff", tensors={"diff": "whole"}, strength=1.0)
    with pytest.raises(RequestError, match="packed weights take plain LoRAs alone, not diff patches; set weight_dtype"):
        weights.change(
            {f"{MLP}.weight": (), f"{QKV}.weight": (lora(), whole)},
            TENSORS | {"whole": torch.zeros(768, 256)},
            base=1,
            number=2,
        )
    assert weights.number == 1 and moved == [1]
    assert_same(after, everything(checkpoint))


def test_parked_weights_take_their_factors_along(packed):
    checkpoint = loaded(packed[0])
    model, plain = checkpoint.model, parking.resident_bytes(parking.tensors_of(checkpoint.model))
    PatchedWeights(checkpoint).change(PATCHES, TENSORS, base=0, number=1)
    before, shard = everything(checkpoint), parking.HostShard(CPU)
    assert parking.resident_bytes(parking.tensors_of(model)) == plain + 4 * (6 * (768 + 256) + 3 * (256 + 768))
    shard.park(parking.tensors_of(model))
    assert not any(t.numel() for t in (*model.parameters(), *model.buffers()))
    shard.reserve()
    shard.fetch()
    assert_same(before, everything(checkpoint))


def test_what_holds_addresses_is_dropped_when_factors_change(packed):
    """Captured graphs do, in the buffers of a denoiser; other weights keep theirs when they are patched."""
    engine, layout = Engine(CPU), Layout(ulysses=1, ring=1)
    engine.describe(spec_of(packed[0]))
    engine.make_room()
    engine.load()
    given, plain_bytes = inputs(MINI, text=24, size=(8, 8), seed=3), engine.nbytes
    prompt = Prompt(given.context, given.y, given.guidance)

    def evaluated() -> tuple[object, torch.Tensor]:
        denoiser = engine.denoiser(layout, Settings())
        (velocity,) = denoiser(given.x, given.timestep, [prompt], lambda: None)
        return denoiser, velocity.clone()

    first, plain = evaluated()
    direct = {key: PATCHES[key] for key in (f"{TXT}.weight", f"{QKV}.bias")}
    engine.patch(direct, TENSORS, base=0, number=1)
    second, changed = evaluated()
    assert second is first and not torch.equal(changed, plain)
    engine.patch({f"{QKV}.weight": PATCHES[f"{QKV}.weight"]}, TENSORS, base=1, number=2)
    assert engine.nbytes > plain_bytes
    third, lora_too = evaluated()
    assert third is not first and relative_difference(lora_too, changed) > 1e-3
    engine.patch({f"{QKV}.weight": ()}, {}, base=2, number=3)
    fourth, without = evaluated()
    assert fourth is not third and torch.equal(without, changed) and engine.nbytes == plain_bytes
    engine.patch({}, {}, base=None, number=0)
    last, undone = evaluated()
    assert last is fourth and torch.equal(undone, plain)
